"""Fitting: known models are found again from logs that were written by them; what is no log is refused by line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.cli.main import main
from kvist.errors import InvalidInput, NotFound
from kvist.sim.config import ClusterConfig, EngineConfig
from kvist.sim.fit import Fit, fit
from kvist.sim.observations import Observations, read_iterations, read_log, read_requests
from kvist.sim.replay import replay
from kvist.sim.report import Report
from kvist.sim.timing import Linear, Table, load_timing
from kvist.sim.trace import Trace

POOL = "(EngineCore pid=1) INFO 11-21 10:55:07 [kv_cache_utils.py:2327] CPU KV cache size: 100,000 tokens, Maximum ..."
REAL = (
    "(APIServer pid=6726) INFO 11-21 10:55:32 [loggers.py:199] Engine 000: Iteration(0): 1 context requests, 300 "
    "context tokens, 0 generation requests, 0 generation tokens, iteration elapsed time: 41.75 ms, CPU KV cache "
    "usage: 5.0%"
)


def line(
    t: int, n: int, ms: float, used: float, *, engine: int = 0, given: int | None = None, dummy: bool = False
) -> str:
    return (
        f"(APIServer pid=7) INFO 11-21 10:55:33 [loggers.py:199] Engine {engine:03d}: Iteration(5): {bool(t):d} "
        f"context requests, {t} context tokens, {n} generation requests, {n if given is None else given} generation "
        f"tokens, iteration elapsed time: {ms:.2f} ms{' (dummy)' if dummy else ''}, GPU KV cache usage: {used:.1f}%"
    )


def duration(model: Linear, t: float, n: float, length: float) -> float:
    square, token, constant = model.prefill
    each, long, base = model.decode
    both = model.mixed_ms if t and n else 0.0
    return bool(t) * (square * t * t + token * t + constant) + bool(n) * (each * n + long * length + base) + both


def passes(model: Linear, count: int = 400, seed: int = 0) -> Iterable[tuple[int, int, float, float]]:
    """(t, n, ms, percent of the pool in use after it): the length that a pass sees was in use before it."""
    draw = random.Random(seed)
    used = 1.0
    for _ in range(count):
        kind = draw.randrange(3)
        t = 0 if kind == 0 else draw.randint(1, 4000)
        n = 0 if kind == 1 else draw.randint(1, 60)
        ms = duration(model, t, n, used / 100 * 100_000 if n else 0.0)
        used = draw.randint(1, 990) / 10
        yield t, n, ms, used


MODEL = Linear((2e-5, 0.05, 9.0), (0.3, 2e-4, 6.0), -4.0)


def is_near(found: Fit, model: Linear, relative: float) -> None:
    assert found.prefill == pytest.approx(model.prefill, rel=relative)
    assert found.decode == pytest.approx(model.decode, rel=relative)
    assert found.mixed_ms == pytest.approx(model.mixed_ms, rel=relative, abs=1e-9)


def test_the_log_of_vllm_gives_its_model_back() -> None:
    lines = [POOL, line(0, 1, 1.0, 1.0), *(line(*row) for row in passes(MODEL))]
    seen = read_iterations(lines, "log")
    found = fit(seen)
    is_near(found, MODEL, 0.01)
    assert (found.kind, found.rows + found.dropped) == ("vllm-iterations", 401)
    assert found.r2 > 0.999999 and {part.name for part in found.parts} == {"prefill", "decode", "both"}


def test_a_real_line_is_read() -> None:
    seen = read_iterations([REAL], "log")
    assert seen.ms.tolist() == [41.75] and seen.features.tolist() == [[90000, 300, 1, 0, 0, 0, 0]]


def test_passes_that_tell_nothing_are_left_out() -> None:
    lines = [POOL, line(0, 2, 9.0, 1.0, given=500), line(0, 0, 3.0, 1.0, dummy=True), line(0, 2, 9.0, 2.0)]
    assert read_iterations(lines, "log").features[:, 3].tolist() == [2]


def test_engines_have_pools_of_their_own() -> None:
    lines = [POOL, line(9, 0, 1.0, 10.0), line(9, 0, 1.0, 50.0, engine=1), line(0, 1, 1.0, 0.0)]
    assert read_iterations(lines, "log").features[2].tolist() == [0, 0, 0, 1, 10_000, 1, 0]


def test_without_the_pools_size_lengths_cost_nothing() -> None:
    found = fit(read_iterations([line(*row) for row in passes(MODEL)], "log"))
    assert found.decode[1] == 0


def test_one_sequence_alone_says_nothing_of_more() -> None:
    """What cannot be told apart goes to the constant."""
    lines = [line(100 * i, 0, 5.0 + i, 1.0) for i in range(1, 20)] + [line(0, 1, 7.0, 1.0)] * 20
    found = fit(read_iterations(lines, "log"))
    assert found.decode == pytest.approx((0, 0, 7)) and found.prefill == pytest.approx((0, 0.01, 5), abs=1e-9)
    assert found.seen["sequences"] == (1, 1) and found.mixed_ms == 0


def test_what_is_far_off_is_left_out_and_counted() -> None:
    rows = [POOL, line(0, 1, 1.0, 1.0), *(line(*row) for row in passes(MODEL))]
    rows[9::40] = [line(300, 5, 9_000.0, 1.0)] * len(rows[9::40])
    found = fit(read_iterations(rows, "log"))
    assert found.dropped >= 10
    is_near(found, MODEL, 0.05)


coefficients = st.floats(0, 1).map(lambda value: 0.0 if value < 1e-3 else value)


@settings(max_examples=50, deadline=None)
@given(st.tuples(*[coefficients] * 6), st.floats(0, 0.99), st.integers(0, 10))
def test_any_model_is_found_to_its_predictions(values: tuple[float, ...], share: float, seed: int) -> None:
    model = Linear(
        (values[0] * 1e-4, values[1], 10 * values[2]),
        (values[3], values[4] * 1e-2, 10 * values[5]),
        -share * 10 * (values[2] + values[5]),
    )
    draw = np.random.default_rng(seed)
    t, n = draw.integers(0, 3000, 200) * draw.integers(0, 2, 200), draw.integers(0, 50, 200) * draw.integers(0, 2, 200)
    n[(t == 0) & (n == 0)] = 1
    length = n * draw.integers(1, 500, 200)
    prefills, decodes = (t > 0) * 1.0, (n > 0) * 1.0
    ms = np.array([duration(model, *row) for row in zip(t.tolist(), n.tolist(), length.tolist(), strict=True)])
    features = np.column_stack((t * t, t, prefills, n, length, decodes, -prefills * decodes))
    found = fit(Observations("requests", ms, features))
    solution = np.array([*found.prefill, *found.decode, -found.mixed_ms])
    assert np.abs(features @ solution - ms).max() <= 1e-5 * max(1.0, ms.max())
    assert (solution >= 0).all() and found.mixed_ms >= -(found.prefill[2] + found.decode[2])


# -- records of requests ---------------------------------------------------------------------------------------------


@pytest.fixture
def simulated(tmp_path: Path) -> Callable[..., Path]:
    """The file of requests of a replay under a model."""

    def call(model: Linear, gap_ms: float, count: int = 300) -> Path:
        draw = np.random.default_rng(3)
        inputs = draw.integers(10, 2000, count)
        arrival = np.cumsum(draw.exponential(gap_ms, count))
        trace = Trace(
            name="made",
            block_size=2000,
            arrival_ms=arrival - arrival[0],
            input_tokens=inputs,
            output_tokens=draw.integers(1, 100, count),
            offsets=np.arange(count + 1),
            block_ids=np.arange(count),
            previous=np.full(count, -1),
            delay_ms=np.zeros(count),
            request_ids=tuple(map(str, range(count))),
        )
        engine, cluster = EngineConfig(num_blocks=4000, timing=model), ClusterConfig()
        Report("made", engine, cluster, replay(trace, engine, cluster), 0.0).write_requests(tmp_path / "requests.jsonl")
        return tmp_path / "requests.jsonl"

    return call


def test_records_of_requests_give_the_model_back(simulated: Callable[..., Path]) -> None:
    model = Linear((2e-5, 0.1, 5.0), (0.4, 2e-3, 4.0), -3.0)
    found = fit(read_log(simulated(model, 700.0)))
    assert found.kind == "requests" and found.r2 > 0.999
    assert found.prefill == pytest.approx(model.prefill, rel=0.05)
    assert found.decode == pytest.approx(model.decode, rel=0.2)


def row(**changes: Any) -> str:
    values = {"arrival_time_ms": 0.0, "first_token_ms": 5.0, "last_token_ms": 9.0, "input_length": 100}
    return json.dumps(values | {"output_length": 3, "reused_input_tokens": 64} | changes)


def test_a_request_alone_gives_two_rows() -> None:
    seen = read_requests([row(), "", row(first_token_ms=None, last_token_ms=None)], "some.jsonl")
    assert seen.ms.tolist() == [2, 5]
    assert seen.features.tolist() == [[0, 0, 0, 1, 102, 1, 0], [36 * 36, 36, 1, 0, 0, 0, 0]]


def test_what_else_was_under_way_counts() -> None:
    """The second decodes for half of the first one's time, and its prompt was computed within it."""
    first = row(first_token_ms=10.0, last_token_ms=30.0, output_length=3, reused_input_tokens=0)
    second = row(arrival_time_ms=12.0, first_token_ms=20.0, last_token_ms=50.0, output_length=2, reused_input_tokens=0)
    seen = read_requests([first, second], "some.jsonl")
    assert seen.ms.tolist() == [10, 30, 10]
    assert seen.features[0].tolist() == pytest.approx(
        [10_000 / 2, 100 / 2, 1 / 2, 1.5, 102 + (101 + 1 / 6) / 2, 1, -1 / 2]
    )
    assert seen.features[1].tolist() == pytest.approx([0, 0, 0, 4 / 3, 101.5 + 102.5 / 3, 1, 0])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"arrival_time_ms": ', "some.jsonl, line 2: expected one JSON object"),
        ('{"arrival_time_ms":' + "[" * 200_000, "some.jsonl, line 2: expected one JSON object, got '{"),
        (row(input_length=10**400), "some.jsonl, line 2: input_length: expected a number, got 1000"),
        ("[1]", "some.jsonl, line 2: expected one JSON object, got '[1]'"),
        (row(input_length="9"), "some.jsonl, line 2: input_length: expected a number, got '9'"),
        (row(input_length=True), "some.jsonl, line 2: input_length: expected a number, got True"),
        (row(last_token_ms=4.0), "some.jsonl, line 2: last_token_ms: expected 5 or more, got 4"),
        (row(arrival_time_ms=6.0), "some.jsonl, line 2: first_token_ms: expected 6 or more, got 5"),
        (row(reused_input_tokens=101), "some.jsonl, line 2: reused_input_tokens: expected at most input_length, 100"),
        (json.dumps({"arrival_time_ms": 1}), "some.jsonl, line 2: first_token_ms: expected a number, got None"),
    ],
)
def test_a_bad_record_is_refused_by_line_and_field(line: str, said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_requests([row(), line], "some.jsonl")
    assert said in str(caught.value)


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("INFO nothing to see\n")
    with pytest.raises(InvalidInput, match="--enable-logging-iteration-details"):
        read_log(tmp_path / "log")
    with pytest.raises(NotFound, match="there is no log"):
        read_log(tmp_path / "none")
    with pytest.raises(InvalidInput, match="cannot read"):
        read_log(tmp_path)


@pytest.mark.parametrize(("t", "n", "said"), [(50, 0, "decoding sequences"), (0, 3, "new prompt tokens")])
def test_half_a_model_is_refused(t: int, n: int, said: str) -> None:
    lines = [line(t, n, 5.0, 1.0)] * 50
    with pytest.raises(InvalidInput, match=f"8 passes with {said} or more; got 0"):
        fit(read_iterations(lines, "log"))


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "vllm.log").write_text("\n".join([POOL, *(line(*row) for row in passes(MODEL))]))
    return tmp_path / "vllm.log"


def test_the_simulator_loads_what_is_written(log: Path, tmp_path: Path) -> None:
    found = fit(read_log(log))
    found.write(tmp_path / "model.json")
    assert load_timing(tmp_path / "model.json") == Linear(found.prefill, found.decode, found.mixed_ms)
    found.write(tmp_path / "model.npz")
    table, linear = load_timing(tmp_path / "model.npz"), replace(MODEL, prefill=found.prefill, decode=found.decode)
    assert isinstance(table, Table)
    assert table.prefill_ms(2000) == pytest.approx(linear.prefill_ms(2000), rel=0.01)
    lengths = np.array([40_000])
    assert table.decode_ms(40, lengths, 1) == pytest.approx(linear.decode_ms(40, lengths, 1), rel=0.05)


def test_the_command(log: Path, tmp_path: Path) -> None:
    target = str(tmp_path / "model.json")
    runner = CliRunner(catch_exceptions=False)
    ran = runner.invoke(main, ["sim", "fit", str(log), "-o", target])
    assert ran.exit_code == 0 and f"wrote {target}" in ran.stdout and "R²" in ran.stdout
    found = json.loads(runner.invoke(main, ["sim", "fit", str(log), "--json"]).stdout)
    assert found["format"] == "kvist-timing-v1" and found["fit"]["rows"] > 300 and found["file"] is None
    assert runner.invoke(main, ["sim", "fit", str(log), "-o", target, "--quiet"]).stdout == target + "\n"
    before = log.read_bytes()
    for output in (log, tmp_path / "no" / "model.json"):
        assert runner.invoke(main, ["sim", "fit", str(log), "-o", str(output)]).exit_code == 2
    assert log.read_bytes() == before
    refused = runner.invoke(main, ["sim", "fit", target, "--json"])
    assert refused.exit_code != 0 and "line 1" in json.loads(refused.stderr)["error"]["message"]
