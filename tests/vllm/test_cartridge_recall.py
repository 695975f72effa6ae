"""Answers that only a cartridge can know: a model that has learnt to recall, three documents, and all the tiers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cartridging import connector, named

from kvist.testing.recall import FORMS, Document, draw_document
from kvist.testing.scenario.requests import at_once
from kvist.testing.vllm import VllmServer

pytest.importorskip("torch")
pytest.importorskip("transformers")

MODEL = Path(__file__).parents[1] / "data" / "recall"
FACTS = 22


@pytest.fixture(scope="module")
def documents() -> dict[str, Document]:
    return {name: draw_document(FACTS, seed=seed) for seed, name in enumerate(("first", "second", "third"))}


@pytest.fixture(scope="module")
def paths(documents: dict[str, Document], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Cartridges of the documents, as system messages of chats."""
    from kvist.cartridge.build import build

    root = tmp_path_factory.mktemp("cartridges")
    return {
        name: build(MODEL, document.text, cartridge_id=name, is_chat=True).save_pretrained(root / name)
        for name, document in documents.items()
    }


@pytest.fixture(scope="module")
def server(paths: dict[str, Path], start: Callable[..., VllmServer]) -> Iterator[VllmServer]:
    listed = [{"cartridge_id": name, "path": str(path)} for name, path in paths.items()]
    config = connector({"cartridges": listed, "router": {"type": "explicit"}})
    server = start(MODEL, None, "--max-model-len", "1024", config=config, dtype="float32")
    yield server
    server.stop()


def reply(server: VllmServer, question: str, cartridge: str | None, *before: dict[str, str]) -> str:
    said = [*before, {"role": "user", "content": question}]
    body: dict[str, Any] = {"messages": said, "max_tokens": 4, "temperature": 0, **named(cartridge)}
    return str(server.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]).strip()


@pytest.mark.parametrize("form", FORMS)
def test_all_questions_are_answered(server: VllmServer, documents: dict[str, Document], form: str) -> None:
    """Without a word of the document in any request; all at once, over all cartridges."""
    asked = [(name, one) for name, document in documents.items() for one in document.questions(form, 10)]
    replies = at_once([lambda n=name, o=one: reply(server, o["question"], n) for name, one in asked])
    right = [said == one["answer"] for (_, one), said in zip(asked, replies, strict=True)]
    assert sum(right) == len(asked) == 30, list(zip(asked, replies, strict=True))


def test_as_the_system_message_says_it(server: VllmServer, documents: dict[str, Document]) -> None:
    for name, document in documents.items():
        system = {"role": "system", "content": document.text}
        for one in document.questions(FORMS[0], 10):
            assert reply(server, one["question"], name) == reply(server, one["question"], None, system)


def test_no_cartridge_knows_what_another_does(server: VllmServer, documents: dict[str, Document]) -> None:
    """Asked about what only another document says, and without any."""
    right = dict.fromkeys((*documents, None), 0)
    asked = documents["first"].questions(FORMS[0])
    only = [
        one
        for one in asked
        if not any(one["answer"] in document.facts.values() for name, document in documents.items() if name != "first")
    ]
    assert len(only) >= 3
    for name in right:
        right[name] = sum(reply(server, one["question"], name) == one["answer"] for one in only)
    assert right == {"first": len(only), "second": 0, "third": 0, None: right[None]}
    assert right[None] < len(only)


def test_validate(
    server: VllmServer,
    documents: dict[str, Document],
    paths: dict[str, Path],
    tmp_path: Path,
    note: Callable[[str], None],
) -> None:
    """Every tier, with 30 questions through the chat API."""
    questions = tmp_path / "questions.jsonl"
    asked = [
        one | {"cartridge": name} for name, document in documents.items() for one in document.questions(FORMS[1], 10)
    ]
    lines = [json.dumps(one) for one in asked]
    questions.write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "kvist", "cartridge", "validate", "--url", server.url]
    command += ["--questions", str(questions), "--answer-tokens", "4"]
    command += [part for name, path in paths.items() for part in ("--cartridge", f"{name}={path}")]
    ran = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = json.loads(ran.stdout)
    assert report["cartridges"] == list(paths)
    assert {tier["tier"]: tier["outcome"] for tier in report["tiers"]} == dict.fromkeys(
        ["0", "0.5", "1", "1b", "2", "3", "4", "5"], "passed"
    ) | {"6": "skipped"}
    details = {tier["tier"]: tier["detail"] for tier in report["tiers"]}
    assert details["1"] == "30 of 30 right"
    for tier, detail in details.items():
        note(f"kvist cartridge validate, tier {tier}: {detail}")


def test_validate_says_what_failed(server: VllmServer, paths: dict[str, Path], tmp_path: Path) -> None:
    """The wrong document, by the table and the exit status."""
    command = [sys.executable, "-m", "kvist", "cartridge", "validate", "--url", server.url, "--id", "first"]
    command += ["--cartridge", f"first={paths['second']}", "--sequential", "2", "--concurrent", "2"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 3, ran.stdout + ran.stderr
    (row,) = [line for line in ran.stdout.splitlines() if line.startswith("0.5 ")]
    assert "failed" in row
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "what is it ?", "wrong": 1}\n')
    ran = subprocess.run([*command, "--questions", str(questions)], capture_output=True, text=True)
    assert ran.returncode == 2
    assert "line 1" in ran.stderr
