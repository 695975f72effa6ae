"""The commands of docs/guides/train.md run, in their order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from kvist.cartridge.cartridge import Cartridge
from kvist.cli.main import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guides" / "train.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    (made,) = blocks("python")
    exec(compile(made, "train.md", "exec"), {})
    _, build, train, judge = blocks("sh")
    for command in (build, train, judge):
        ran = CliRunner().invoke(main, shlex.split(command.replace("\\\n", " "))[1:])
        assert ran.exit_code == 0, ran.stderr
    with Cartridge.from_pretrained("short") as short, Cartridge.from_pretrained("whole") as whole:
        assert (short.num_tokens, whole.num_tokens) == (33, 135)
        arms = {arm["arm"]: arm for arm in short.manifest.provenance["quality"]["arms"]}
    assert arms["full document"]["right"] == arms["lossless cartridge"]["right"] == 10
    assert arms["short"]["right"] > arms["first 33 tokens, untrained"]["right"]


def test_the_other_commands_are_real() -> None:
    (command,) = blocks("text")
    words = shlex.split(command.replace("\\\n", " "))
    context = main.make_context("kvist", ["cartridge", "train", "--help"], resilient_parsing=True)
    group = main.get_command(context, "cartridge")
    train = group.get_command(context, "train")  # type: ignore[union-attr]
    options = {name for param in train.params for name in param.opts}
    assert {word for word in words if word.startswith("-")} <= options
