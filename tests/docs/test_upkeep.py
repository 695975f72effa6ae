"""The commands and the code of docs/guides/upkeep.md run, in order, and its table has every finding."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from cli.conftest import run
from kvist.repo import Repository, fsck
from kvist.testing.repo_model import content, manifest_of

PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "upkeep.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_commands_and_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store, copy = tmp_path / "kv", tmp_path / "copy"
    with Repository.init(store.as_uri()) as repo:
        repo.put_pages([content(number) for number in range(6)])
        for numbers in ([0, 1, 2], [0, 1, 2, 3], [4, 5]):
            repo.commit([manifest_of(numbers)], branch="main")
    shutil.copytree(store, copy)
    monkeypatch.setattr("kvist.cli.output.Output.can_ask", True)
    environment = {"KVIST_STORE": store.as_uri(), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    for line in lines:
        words = shlex.split(line.removesuffix("&&").replace("s3://backups/kv", copy.as_uri()), comments=True)
        assert words[0] == "kvist"
        ran = run(words[1:], environment, stdin="y\n")
        assert ran.code == 0, (line, ran.err)
    (code,) = blocks("python")
    exec(compile(code.replace("file:///srv/kv", store.as_uri()), "upkeep.md", "exec"), {})
    assert "prune 0 snapshots" in capsys.readouterr().out
    with Repository.open(store.as_uri()) as repo:
        assert fsck.check(repo).is_clean


def test_every_finding_is_in_the_table() -> None:
    named = set(
        re.findall(r"`([a-z_]+)`", "\n".join(line.split("|")[1] for line in PAGE.splitlines() if "| `" in line))
    )
    assert {code.value for code in fsck.Code} <= named
