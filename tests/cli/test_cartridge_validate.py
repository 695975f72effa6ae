"""`kvist cartridge validate` against `kvist serve`, with a model that has learnt to recall. vLLM: tests/vllm."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvist.testing.recall import FORMS, draw_document

pytest.importorskip("torch")
pytest.importorskip("transformers")

MODEL = Path(__file__).parents[1] / "data" / "recall"


def kvist(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvist", "cartridge", "validate", *arguments], capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from kvist.cartridge.build import build

    root = tmp_path_factory.mktemp("cartridges")
    return {
        name: build(MODEL, draw_document(12, seed=seed).text, cartridge_id=name, is_chat=True).save_pretrained(
            root / name
        )
        for seed, name in enumerate(("first", "second"))
    }


@contextlib.contextmanager
def serving(store: Path, *options: str) -> Iterator[str]:
    command = [sys.executable, "-m", "kvist", "serve", "--model", str(MODEL), "--port", "0", "--store", str(store)]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            for line in server.stderr:
                if found := re.search(r"http://[\d.]+:\d+", line):
                    yield found[0]
                    break
            else:
                raise AssertionError("the server ended before it was ready")
        finally:
            server.terminate()
            server.wait()
            server.stderr.close()


@pytest.fixture(scope="module")
def url(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with both."""
    known = [part for name, path in paths.items() for part in ("--cartridge", f"{name}={path}")]
    with serving(tmp_path_factory.mktemp("kv") / "store", *known) as url:
        yield url


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    lines = [
        json.dumps(one | {"cartridge": name})
        for seed, name in enumerate(("first", "second"))
        for one in draw_document(12, seed=seed).questions(FORMS[1], 5)
    ]
    path.write_text("\n\n".join(lines) + "\n")
    return path


def test_every_tier(url: str, paths: dict[str, Path], questions: Path) -> None:
    known = [part for name, path in paths.items() for part in ("--cartridge", f"{name}={path}")]
    ran = kvist(
        "--url", url, *known, "--questions", str(questions), "--answer-tokens", "4", "--sequential", "10", "--json"
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = json.loads(ran.stdout)
    assert report["passed"] is True
    assert report["cartridges"] == ["first", "second"]
    tiers = {tier["tier"]: tier for tier in report["tiers"]}
    assert list(tiers) == ["0", "0.5", "1", "1b", "2", "3", "4", "5", "6"]
    assert {tier["outcome"] for number, tier in tiers.items() if number != "6"} == {"passed"}
    assert tiers["1"]["detail"] == "10 of 10 right"


@pytest.mark.parametrize(
    ("more", "answers"),
    [({"unknown": "compute"}, True), ({"router": {"type": "static", "cartridge_id": "first"}}, False)],
    ids=["compute", "static"],
)
def test_a_server_configured_otherwise(
    paths: dict[str, Path], tmp_path: Path, more: dict[str, Any], answers: bool
) -> None:
    """No tier fails for it."""
    config = {"cartridges": [{"cartridge_id": "first", "path": str(paths["first"])}], **more}
    with serving(tmp_path / "store", "--cartridge-config", json.dumps(config)) as url:
        ran = kvist("--url", url, "--id", "first", "--sequential", "1", "--concurrent", "1", "--json")
    (tier,) = [tier for tier in json.loads(ran.stdout)["tiers"] if tier["tier"] == "5"]
    assert tier["outcome"] == "passed", tier
    assert ("unknown ids are answered" in tier["detail"]) is answers


def test_the_wrong_document(url: str, paths: dict[str, Path]) -> None:
    """By the exit status, the table, and what `--quiet` prints."""
    wrong = ["--url", url, "--id", "first", "--cartridge", f"first={paths['second']}"]
    wrong += ["--sequential", "2", "--concurrent", "2"]
    ran = kvist(*wrong)
    assert ran.returncode == 3, ran.stdout + ran.stderr
    rows = {line.split()[0]: line for line in ran.stdout.splitlines()[1:]}
    assert "failed" in rows["0.5"]
    assert "passed" in rows["4"]
    assert kvist(*wrong, "--quiet").stdout.split() == ["0.5", "1"]


def test_wrong_answers(url: str, paths: dict[str, Path], tmp_path: Path) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"question": "what does ada keep ?", "answer": "nothing at all"}))
    ran = kvist("--url", url, "--questions", str(asked), "--sequential", "1", "--concurrent", "1", "--json")
    assert ran.returncode == 3, ran.stderr
    (tier,) = [tier for tier in json.loads(ran.stdout)["tiers"] if tier["outcome"] == "failed"]
    assert tier["tier"] == "1"
    assert "0 of 1 right" in tier["detail"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--cartridge", "nowhere"], "ID=PATH"),
        (["--cartridge", "a=/nowhere"], "/nowhere is not there"),
    ],
)
def test_arguments(arguments: list[str], text: str) -> None:
    ran = kvist("--url", "http://127.0.0.1:9", *arguments)
    assert ran.returncode == 2
    assert text in ran.stderr


def test_no_server() -> None:
    ran = kvist("--url", "http://127.0.0.1:9", "--id", "x")
    assert ran.returncode == 40
    assert "no server answers" in ran.stderr


def test_questions_that_are_none(url: str, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    for content, text in (("{}", "line 1"), ("[1]", "line 1"), ("{", "line 1"), ("", "at least one question")):
        path.write_text(content)
        ran = kvist("--url", url, "--questions", str(path))
        assert ran.returncode == 2, ran.stderr
        assert text in ran.stderr
