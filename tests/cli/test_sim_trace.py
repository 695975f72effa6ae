"""`kvist sim describe` and `kvist sim generate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvist.sim import workload
from kvist.sim.describe import describe
from kvist.sim.trace import read_trace
from kvist.sim.workload import Arrivals, Lengths

from .conftest import Ran, run


def kvist(*words: object) -> Ran:
    return run([str(word) for word in words], {})


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    rows = [
        {"timestamp": 100, "input_length": 1024, "output_length": 3, "hash_ids": [1, 2], "session_id": "s"},
        {"timestamp": 600, "input_length": 600, "output_length": 5, "hash_ids": [1, 3]},
        {"input_length": 1024, "output_length": 1, "hash_ids": [1, 2], "session_id": "s", "delay": 9},
    ]
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_describe(trace: Path) -> None:
    ran = kvist("sim", "describe", trace, "--json")
    assert (ran.code, ran.err) == (0, "")
    assert ran.json == describe(read_trace(trace)).to_json()
    assert {name: value for name, value in ran.json.items() if not isinstance(value, dict)} == {
        "name": "some",
        "requests": 3,
        "trace_block_size": 512,
        "span_ms": 500.0,
        "requests_per_s": 4.0,
        "turns": 1,
        "forks": 0,
        "blocks": 6,
        "unique_blocks": 3,
        "block_hit_ratio": 0.5,
        "block_size": 64,
        "engine_blocks": 16 + 9 + 16,
        "unique_engine_blocks": 17,
        "reused_ratio": (15 * 64 + 8 * 64) / 2648,  # of the last prompt all but one block: a token must be computed
    }
    assert ran.json["input_tokens"]["total"] == 2648 and ran.json["output_tokens"]["max"] == 5
    human = kvist("sim", "describe", trace)
    assert "seen before" in human.out and "50.00%" in human.out and "\ninput" in human.out
    assert kvist("sim", "describe", trace, "-q").out == "some\n"
    assert kvist("sim", "describe", trace, "--limit", "1", "--block-size", "512", "--json").json["engine_blocks"] == 2
    assert kvist("sim", "describe", trace, "--trace-block-size", "1024", "--json").json["trace_block_size"] == 1024


def test_a_bad_trace(trace: Path) -> None:
    trace.write_text(trace.read_text() + '\n{"timestamp": "now", "hash_ids": []}')
    ran = kvist("sim", "describe", trace, "--json")
    assert (ran.code, ran.out, ran.error["kind"]) == (2, "", "invalid_input")
    assert ran.error["message"] == f"{trace}, line 4: timestamp: expected float, got 'now'"
    ran = kvist("sim", "describe", trace.with_name("none.jsonl"), "--json")
    assert (ran.code, ran.error["kind"]) == (4, "not_found")


COMMON = {"output": Lengths(20, 0.5), "arrivals": Arrivals(2.5, "burst", 3), "block_size": 64, "seed": 7}
OPTIONS = "--output-tokens 20 --sigma 0.5 --rate 2.5 --arrivals burst --burst 3 --trace-block-size 64 --seed 7"
KINDS = {
    "prefixes --requests 9 --input-tokens 300 --shared-prefix-ratio 0.6 --prefix-groups 2": workload.shared_prefixes(
        requests=9, prompt=Lengths(300, 0.5), shared_prefix_ratio=0.6, prefix_groups=2, **COMMON
    ),
    "sessions --sessions 4 --turns 3 --system-tokens 70 --message-tokens 50 --delay-ms 30": workload.sessions(
        count=4, turns=3, system_tokens=70, message=Lengths(50, 0.5), mean_delay_ms=30, **COMMON
    ),
    "agents --trees 2 --depth 3 --forks 2 --system-tokens 0 --message-tokens 99 --delay-ms 0": workload.agent_trees(
        count=2, depth=3, forks=2, system_tokens=0, message=Lengths(99, 0.5), mean_delay_ms=0, **COMMON
    ),
    "documents --requests 9 --documents 4 --skew 2 --document-tokens 500 --message-tokens 9": workload.documents(
        requests=9, count=4, skew=2, document=Lengths(500, 0.5), message=Lengths(9, 0.5), **COMMON
    ),
}


@pytest.mark.parametrize("words", KINDS, ids=lambda words: words.split()[0])
def test_generate(tmp_path: Path, words: str) -> None:
    path = tmp_path / "made.jsonl.gz"
    ran = kvist("sim", "generate", *words.split(), *OPTIONS.split(), "--out", path, "--json")
    assert (ran.code, ran.err) == (0, "")
    expected = KINDS[words]
    assert ran.json == {"file": str(path)} | describe(expected).to_json()
    read = read_trace(path)
    assert read.block_size == 64 and read.block_ids.tolist() == expected.block_ids.tolist()
    assert read.delay_ms.tolist() == expected.delay_ms.tolist()
    first = path.read_bytes()
    ran = kvist("sim", "generate", *words.split(), *OPTIONS.split(), "--out", path)
    assert ran.out.endswith(f"wrote {path}\n") and path.read_bytes() == first


def test_generate_what_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "made.jsonl"
    for words in ("prefixes --shared-prefix-ratio 2", "agents --forks 100 --depth 9", "sessions --sigma 4"):
        ran = kvist("sim", "generate", *words.split(), "--out", path, "--json")
        assert (ran.code, ran.error["kind"]) == (2, "invalid_input")
    assert not path.exists()
    assert kvist("sim", "generate", "sessions", "--out", tmp_path / "no" / "t.jsonl").code == 2
    for name in ("--rate", "--sigma", "--delay-ms"):
        assert kvist("sim", "generate", "sessions", "--out", path, name, "nan").code == 2
    huge = "--trace-block-size 1 --document-tokens 2147483647 --requests 9 --documents 1"
    assert "blocks" in kvist("sim", "generate", "documents", *huge.split(), "--out", path, "--json").error["message"]
