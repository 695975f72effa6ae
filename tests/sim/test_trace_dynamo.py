"""What trace files mean, against the real NVIDIA Dynamo where ``KVIST_DYNAMO_PYTHON`` names an interpreter that has it.

Each request has a length of its own, by which it is known; the engine has one seat, so that the order shows.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvist.errors import InvalidInput
from kvist.sim.trace import Trace, read_trace

PYTHON = os.environ.get("KVIST_DYNAMO_PYTHON", "")
PEER = Path(__file__).with_name("trace_peer.py")


def row(inputs: int, time: float | None = None, **more: Any) -> dict[str, Any]:
    given = {} if time is None else {"timestamp": time}
    ids = [1000 * inputs + block for block in range(-(-inputs // 512))]
    return given | {"input_length": inputs, "output_length": 5, "hash_ids": ids} | more


GOOD: dict[str, list[dict[str, Any]]] = {
    "the first is not at 0": [row(601, 286), row(602, 500.1234567), row(603, 9000)],
    "before the origin": [row(601, -5), row(602, 700)],
    "not sorted": [row(601, 2000), row(602, 1000), row(603, 0), row(604, 1000), row(605, 1000)],
    "at once": [row(600 + number, 7) for number in range(9)],
    "delays": [row(601, 3, session_id="a"), row(602, session_id="a", delay=40), row(603, session_id="a", delay_ms=0.5)],
    "times for delays": [row(600 + number, time, session_id="a") for number, time in enumerate((100, 250, 250, 9000))],
    "a delay wins": [
        row(601, 100, session_id="a"),
        row(602, 200, session_id="a", delay=5),
        row(603, 250, session_id="a"),
    ],
    "a turn without": [row(601, 9, session_id="a"), row(602, session_id="a"), row(603, 509, session_id="a")],
    "sessions": [
        row(601, 100, session_id="a"),
        row(602, 50, session_id="b"),
        row(603, session_id="a", delay=1000),
        row(604, session_id="b", delay=6),
        row(605, 60),
    ],
    "no tokens": [row(601, 0, output_length=0), row(602, 10), row(603, 20, output_length=0)],
    "more ids than needed": [row(601, 0, hash_ids=[1, 2, 3, 4, 5]), row(602, 900, hash_ids=[2**64 - 1, 2**63])],
    "fields that are not used": [row(601, 5, priority=3, strict_priority=2, request_id="x", output_token_ids=[1] * 5)],
    "the other names": [{"created_time": 5, "input_tokens": 601, "output_tokens": 3, "hash_ids": [1, 2]}],
}
BAD: dict[str, list[dict[str, Any]]] = {
    "nothing": [],
    "no prompt": [row(0, 0, hash_ids=[1])],
    "fewer ids than needed": [row(600, 0, hash_ids=[1])],
    "no ids": [{"timestamp": 0, "input_length": 1, "output_length": 1}],
    "no output": [{"timestamp": 0, "input_length": 1, "hash_ids": [1]}],
    "both names": [row(600, 0, created_time=0)],
    "a delay that follows nothing": [row(600, 0), row(601, delay=5)],
    "a delay on a first turn": [row(600, 0, session_id="a", delay=5)],
    "back in time": [row(600, 100, session_id="a"), row(601, 50, session_id="a")],
    "a delay below 0": [row(600, 100, session_id="a"), row(601, session_id="a", delay=-1)],
    "an id below 0": [row(600, 0, hash_ids=[1, -1])],
    "an id too large": [row(600, 0, hash_ids=[1, 2**64])],
    "half a token": [row(600, 0, input_length=600.5)],
    "a session with a number": [row(600, 0, session_id=3)],
    "output of another length": [row(600, 0, output_token_ids=[1])],
}


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Of each case its file, and what Dynamo made of it."""
    directory = tmp_path_factory.mktemp("traces")
    files = {}
    for number, (name, rows) in enumerate({**GOOD, **BAD}.items()):
        files[name] = directory / f"{number}.jsonl"
        files[name].write_text("".join(json.dumps(one) + "\n" for one in rows))
    try:
        environment = {**os.environ, "DYN_LOG": "error"}
        command = [PYTHON or "python-with-dynamo", PEER, *files.values()]
        ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no dynamo at KVIST_DYNAMO_PYTHON={PYTHON!r}: {getattr(error, 'stderr', error)}")
    answers = json.loads(ran.stdout.splitlines()[-1])
    return {name: (path, answer) for (name, path), answer in zip(files.items(), answers, strict=True)}


@pytest.mark.parametrize("name", GOOD)
def test_times_and_order(replayed: dict[str, tuple[Path, Any]], name: str) -> None:
    path, answer = replayed[name]
    trace: Trace = read_trace(path)
    found = {one["input_length"]: one for one in answer}
    assert set(found) == set(trace.input_tokens.tolist())
    rows = [found[length] for length in trace.input_tokens.tolist()]
    for number, (one, previous) in enumerate(zip(rows, trace.previous.tolist(), strict=True)):
        if previous < 0:
            assert one["arrival_time_ms"] == trace.arrival_ms[number]
        else:
            waited = one["arrival_time_ms"] - rows[previous]["last_token_ms"]
            assert waited == pytest.approx(trace.delay_ms[number], abs=1e-6)
    first = [one["first_admit_ms"] for one, previous in zip(rows, trace.previous, strict=True) if previous < 0]
    assert np.all(np.diff(first) > 0)


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(replayed: dict[str, tuple[Path, Any]], name: str) -> None:
    path, answer = replayed[name]
    assert isinstance(answer, str), answer
    with pytest.raises(InvalidInput):
        read_trace(path)
