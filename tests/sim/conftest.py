"""The public traces, where they are, and how traces are compared."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from kvist.sim.trace import Trace

SHARED = Path(os.environ.get("KVIST_SHARED", Path(__file__).parents[3] / "shared")) / "data"


def equal(one: Trace, other: Trace) -> None:
    """Assert that two traces are the same, bit for bit."""
    for column in fields(Trace):
        here, there = getattr(one, column.name), getattr(other, column.name)
        if isinstance(here, np.ndarray):
            assert here.dtype == there.dtype, column.name
            np.testing.assert_array_equal(here, there, err_msg=column.name)
        else:
            assert here == there, column.name


@pytest.fixture(scope="session")
def public_traces() -> Path:
    """The directory of the public traces; the test is skipped where there is none."""
    if not (SHARED / "traces").is_dir():
        pytest.skip(f"no traces at {SHARED / 'traces'}; KVIST_SHARED says where")
    return SHARED / "traces"
