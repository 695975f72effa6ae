"""What pins the KV of given tokens: the name that layouts have for it must never change by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvist.engines.paged.pinning import pinned
from kvist.errors import UnsupportedModel
from kvist.hashing import weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_what_the_operator_says_comes_first_then_the_files_then_a_commit(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    found = [
        pinned(where, given=given, asked=COMMIT, changes={}, option="")
        for where, given in ((tmp_path, "mine"), (tmp_path, None), (tmp_path / "nowhere", None))
    ]
    assert found == ["mine", weights.revision(tmp_path), COMMIT]


@pytest.mark.parametrize("asked", [None, "", "main", COMMIT[:-1]])
def test_a_branch_pins_nothing(asked: str | None) -> None:
    with pytest.raises(UnsupportedModel, match=r"nothing pins the weights of a/model: .*`revision` where it is said"):
        pinned(Path("a/model"), given=None, asked=asked, changes={}, option="where it is said")


def test_what_the_command_line_changes_is_part_of_it() -> None:
    def named(**changes: object) -> str:
        return pinned(Path("a/model"), given="mine", asked=None, changes=changes, option="")

    assert named(hf_overrides=None, quantization=None) == "mine"
    assert named(hf_overrides=None, quantization="fp8") == named(quantization="fp8", hf_overrides=None)
    assert named(hf_overrides=None, quantization="fp8") == "mine+37ecfc54d6936c82"
