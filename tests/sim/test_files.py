"""Files are there whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvist.errors import StoreError
from kvist.sim.files import write_whole


def broken() -> Iterator[bytes]:
    yield b"half"
    raise ArithmeticError


def test_what_breaks_off_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, [b"old"])
    with pytest.raises(ArithmeticError):
        write_whole(path, broken())
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == {"file": b"old"}
    write_whole(path, [b"ne", b"w"])
    assert path.read_bytes() == b"new"


def test_what_is_no_file_stays_what_it_is() -> None:
    write_whole(Path("/dev/null"), [b"gone"])
    assert Path("/dev/null").is_char_device()


def test_what_can_not_be_written_is_told_by_name(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere"):
        write_whole(tmp_path / "nowhere" / "file", [b""])
