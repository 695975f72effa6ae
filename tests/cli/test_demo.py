"""The demo, in full: real workers, a real SIGKILL, every logit of every line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_every_line_continues_bit_for_bit() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvist", "demo", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["bit_exact"] is True
    assert told["max_abs_logit_diff"] == 0
    assert told["recomputed_tokens"] == 0
    assert told["fork_storage_ratio"] <= 1.004
    assert [case["case"] for case in told["cases"]] == ["greedy", "seeded", "greedy, busy", "seeded, busy"]
    for case in told["cases"]:
        assert case["bit_exact"] is True
        assert (case["lines"], case["tokens"]) == (13, 100)
        assert case["restored_tokens"] == case["reprefill_tokens"] == 1049
