"""`kvist sim curve`: its table, its JSON, its files, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvist.blocks.policy import POLICIES
from sim.making import trace_lines

from .conftest import Ran, run


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "small.jsonl"
    path.write_text(trace_lines())
    return str(path)


def drawn(*words: str) -> Ran:
    return run(["sim", "curve", *words], {"KVIST_STORE": None})


def test_people_get_a_table(trace: str) -> None:
    ran = drawn(trace, "--points", "3")
    assert ran.code == 0, ran.err
    assert ran.lines[0] == "small: 40 requests, 120 blocks of 512 tokens, 64 of them different"
    assert ran.lines[3].split() == ["blocks", *POLICIES, "ceiling"]
    assert [line.split()[0] for line in ran.lines[4:]] == ["1", "8", "64"]


def test_json_has_all_points(trace: str) -> None:
    ran = drawn(trace, "--policy", "belady", "--policy", "lru", "--capacity", "64", "--capacity", "4", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["capacities"] == [4, 64]
    assert list(ran.json["curves"]) == ["belady", "lru", "ceiling"]
    assert ran.json["curves"]["lru"]["hit_blocks"][1] == 56
    assert ran.json["files"] == {}


def test_quiet_prints_capacities(trace: str) -> None:
    assert drawn(trace, "--capacity", "9", "--policy", "fifo", "--quiet").lines == ["9"]


def test_files_are_written(trace: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture, page = tmp_path / "curve.png", tmp_path / "curve.html"
    ran = drawn(trace, "--points", "2", "--block-size", "64", "--png", str(picture), "--html", str(page))
    assert ran.code == 0, ran.err
    assert ran.lines[-2:] == [f"wrote {picture}", f"wrote {page}"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert page.read_text().startswith("<!doctype html>")


def test_processes_give_the_same_table(trace: str) -> None:
    words = trace, "--points", "3", "--policy", "lfu", "--policy", "arc"
    assert drawn(*words, "--jobs", "2").out == drawn(*words).out


def test_the_trace_is_not_written_over(trace: str) -> None:
    before = Path(trace).read_bytes()
    assert "png must be a file of its own, not the file that is read" in drawn(trace, "--png", trace).err
    assert "html must be a file of its own, not that of png" in drawn(trace, "--png", "x", "--html", "./x").err
    assert Path(trace).read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--policy", "mru"], "'mru' is not one of"),
        (["--capacity", "0"], "0 is not in the range"),
        (["--block-size", "0"], "0 is not in the range"),
        (["--capacity", "9" * 20], "is not in the range"),
        (["--points", "100000"], "is not in the range"),
        (["--block-size", "9" * 20], "is not in the range"),
        (["--jobs", "99999999"], "is not in the range"),
        (["--html", "/nowhere/curve.html"], "there is no directory"),
    ],
)
def test_what_cannot_be_right_is_refused(trace: str, words: list[str], message: str) -> None:
    ran = drawn(trace, *words)
    assert ran.code == 2
    assert message in ran.err
