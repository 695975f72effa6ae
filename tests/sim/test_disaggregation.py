"""What disaggregation means, beyond the figures of `test_golden`."""

from __future__ import annotations

import numpy as np
import pytest

from kvist.errors import InvalidInput
from kvist.sim.config import ClusterConfig, EngineConfig
from kvist.sim.replay import replay
from kvist.sim.timing import Fixed
from kvist.sim.trace import Trace, read_trace

from .test_golden import DYNAMO

ENGINE = EngineConfig(num_blocks=96, timing=Fixed(10.0, 2.0), kv_bytes_per_token=1_000_000)
CLUSTER = ClusterConfig(prefill_workers=1, transfer_gbps=1.0)
"""A token takes 1 ms on its way."""


@pytest.fixture
def trace() -> Trace:
    return read_trace(DYNAMO / "trace.jsonl", block_size=128)


def only(trace: Trace, rows: int) -> Trace:
    return trace.head(rows)


def test_times_of_one_request(trace: Trace) -> None:
    records = replay(only(trace, 1), ENGINE, CLUSTER)
    prompt, answer = int(records.input_length[0]), int(records.output_length[0])
    assert records.first_admit_ms[0] == 0
    assert records.first_token_ms[0] == 10 + prompt + 2
    assert records.second_token_ms[0] == 10 + prompt + 4
    assert records.last_token_ms[0] == 10 + prompt + 2 * answer
    assert (records.prefill_worker[0], records.worker[0]) == (0, 0)
    assert (records.admission_count[0], records.readmission_count[0]) == (2, 0)
    assert records.busy_ms.tolist() == [2 * answer, 10]
    assert dict(zip(records.token_gaps_ms, records.token_gap_counts, strict=True))[2.0] == answer - 1


def test_what_the_receiver_has_need_not_be_sent(trace: Trace) -> None:
    whole = replay(trace, ENGINE, CLUSTER)
    missing = replay(trace, ENGINE, ClusterConfig(prefill_workers=1, transfer_gbps=1.0, transfer_only_missing=True))
    assert missing.duration_ms < whole.duration_ms
    np.testing.assert_array_equal(missing.output_length, whole.output_length)


@pytest.mark.parametrize("router", ["round_robin", "kv"])
def test_everybody_is_served_whatever_runs_short(trace: Trace, router: str) -> None:
    engine = EngineConfig(
        num_blocks=30, max_num_seqs=3, max_num_batched_tokens=300, kv_bytes_per_token=1000, reject_oversized=True
    )
    cluster = ClusterConfig(workers=2, prefill_workers=2, router=router, seed=3)  # type: ignore[arg-type]
    records = replay(trace, engine, cluster, timeline=True)
    served = records.status == 0
    assert served.sum() == len(trace) - 2
    np.testing.assert_array_equal(records.output_length[served], trace.output_tokens[served])
    assert (records.worker[~served] == -1).all()
    assert records.token_gap_counts.sum() == np.maximum(records.output_length - 1, 0).sum()
    assert {segment.worker for segment in records.segments} == {0, 1, 2, 3}
    again = replay(trace, engine, cluster)
    np.testing.assert_array_equal(again.last_token_ms, records.last_token_ms)


def test_what_is_not_simulated_is_refused(trace: Trace) -> None:
    with pytest.raises(InvalidInput, match="prefill_workers is not simulated for the scheduling of sglang"):
        replay(trace, EngineConfig(scheduling="sglang"), CLUSTER)
    with pytest.raises(InvalidInput, match="dp_size is not simulated for the scheduling of sglang"):
        replay(trace, EngineConfig(scheduling="sglang"), ClusterConfig(dp_size=2))
    with pytest.raises(InvalidInput, match="prefill_workers needs a dp_size of 1; got 2"):
        replay(trace, ENGINE, ClusterConfig(prefill_workers=1, dp_size=2))
