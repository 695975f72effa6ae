"""`kvist sim sweep`: a row for each combination, the same from any number of processes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from sim.making import trace_lines

from .conftest import Ran, run


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "small.jsonl"
    path.write_text(trace_lines())
    return str(path)


def swept(*words: str) -> Ran:
    return run(["sim", "sweep", *words], {"KVIST_STORE": None})


def test_a_row_for_each_combination(trace: str, tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    words = ("--workers", "1,2", "--num-blocks", "64,4096", "--sla-e2e-ms", "500")
    ran = swept(trace, *words, "--csv", str(out), "--json")
    assert ran.code == 0, ran.err
    rows = ran.json["rows"]
    assert [(row["workers"], row["num_blocks"]) for row in rows] == [(1, 64), (1, 4096), (2, 64), (2, 4096)]
    assert rows[0]["settings"]["cluster"]["workers"] == 1
    read = list(csv.DictReader(out.read_text().splitlines()))
    assert [float(line["p95_ttft_ms"]) for line in read] == [row["figures"]["p95_ttft_ms"] for row in rows]
    assert swept(trace, *words, "--jobs", "2", "--json").json["rows"] == rows


def test_people_see_what_differs(trace: str) -> None:
    ran = swept(trace, "--num-blocks", "64,4096")
    assert ran.lines[0].split()[:4] == ["num", "blocks", "from", "cache"]
    assert len(ran.lines) == 3
    assert swept(trace, "--num-blocks", "64,4096", "--quiet").lines[1].split()[3] == "num_blocks=4096"


def test_the_trace_is_not_written_over(trace: str) -> None:
    before = Path(trace).read_bytes()
    assert "csv must be a file of its own" in swept(trace, "--csv", trace, "--json").error["message"]
    assert Path(trace).read_bytes() == before


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--workers", "1,0"], "workers"),
        (["--workers", "1,1"], "workers"),
        (["--workers", "1,x"], "--workers"),
        (["--policy", "lru,magic"], "--policy"),
        (["--num-blocks", ""], "--num-blocks"),
        (["--jobs", "0"], "--jobs"),
        (["--jobs", "99999999"], "--jobs"),
        (["--scheduling", "sglang", "--policy", "vllm,lfu"], "policy is not simulated"),
    ],
)
def test_what_can_not_be_is_refused_by_name(trace: str, words: list[str], named: str) -> None:
    ran = swept(trace, *words, "--json")
    assert (ran.code, ran.out) == (2, "")
    assert named in ran.error["message"]
