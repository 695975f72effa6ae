"""What a real server's passes took, from its own log or its clients' records: the rows that a time model is fitted to.

It knows two sources, and nothing of how they are fitted:

* the log of a vLLM 0.32 that was started with ``--enable-logging-iteration-details``: a line a pass. It leaves out what
  the server does between passes. It tells lengths only as a share of the pool, and with the line on the pool's size.
* a JSONL of requests as ``kvist sim run --per-request`` writes it, from any server's clients: the time to the first
  token of requests that were alone, and of all requests the times between tokens, with whatever else was under way.
  It has all that a client waits for, and tells passes that do both less well apart.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvist.errors import InvalidInput, NotFound

Floats = NDArray[np.float64]

_PASS: Final = re.compile(
    r"(?:Engine (\d+): )?Iteration\(\d+\): (\d+) context requests, (\d+) context tokens, (\d+) generation requests, "
    r"(\d+) generation tokens, iteration elapsed time: ([\d.]+) ms( \(dummy\))?, \S+ KV cache usage: ([\d.]+)%"
)
_POOL: Final = re.compile(r"KV cache size: ([\d,]+) tokens")
_FIELDS: Final = (
    "arrival_time_ms",
    "first_token_ms",
    "last_token_ms",
    "input_length",
    "output_length",
    "reused_input_tokens",
)
_ONE_PASS_MS: Final = 1.0
"""First tokens that are no further apart are of one pass."""


@dataclass(frozen=True, slots=True, eq=False)
class Observations:
    """Times that were measured, and what they were spent on.

    Attributes:
        kind: ``"vllm-iterations"`` or ``"requests"``.
        ms: [rows].
        features: [rows, 7]: of prefill t², t, 1; of decode n, L, 1; and -1 where a pass did both. A row that stands for
            several passes has their mean.
    """

    kind: str
    ms: Floats
    features: Floats


def read_log(path: Path) -> Observations:
    """Read either source: lines of JSON are requests.

    Raises:
        NotFound: there is no such file.
        InvalidInput: it is neither, or a line is wrong; the message names it.
    """
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError as error:
        raise NotFound(f"there is no log {path}") from error
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from error
    first = next((line for line in lines if line.strip()), "")
    return read_requests(lines, str(path)) if first.startswith("{") else read_iterations(lines, str(path))


def read_iterations(lines: Iterable[str], name: str) -> Observations:
    """Read vLLM's log. Passes that compute a preempted sequence anew are left out: they count as decoding there.

    Raises:
        InvalidInput: it tells of no pass.
    """
    capacity = 0.0
    usage: dict[str, float] = {}  # of each engine, when its last pass had ended
    rows: list[tuple[float, ...]] = []
    for line in lines:
        if pool := _POOL.search(line):
            capacity = float(pool[1].replace(",", ""))
        if not (found := _PASS.search(line)):
            continue
        engine, dummy = found[1] or "", found[7]
        prompts, tokens, sequences, given, ms, used = (float(found[i]) for i in (2, 3, 4, 5, 6, 8))
        before, usage[engine] = usage.get(engine, used), used
        if not dummy and given == sequences and prompts + sequences:
            rows.append((ms, tokens, sequences, before / 100 * capacity if sequences else 0.0))
    if not rows:
        raise InvalidInput(
            f"{name} has neither requests, one a line of JSON, nor lines of a vLLM that was started with "
            "--enable-logging-iteration-details"
        )
    ms_, t, n, length = np.array(rows).T
    prefills, decodes = (t > 0).astype(float), (n > 0).astype(float)
    return Observations(
        "vllm-iterations", ms_, np.column_stack((t * t, t, prefills, n, length, decodes, -prefills * decodes))
    )


def read_requests(lines: Iterable[str], name: str) -> Observations:
    """Read records of requests. Such as got no token are skipped.

    Raises:
        InvalidInput: a line is no record; the message names file, line and field.
    """
    rows = [
        row for number, line in enumerate(lines, 1) if line.strip() and (row := _record(line, f"{name}, line {number}"))
    ]
    arrival, first, last, inputs, outputs, cached = np.array(rows, dtype=float).reshape(-1, len(_FIELDS)).T
    new = inputs - cached
    by_first = np.argsort(first, kind="stable")
    starts = np.flatnonzero(np.diff(first[by_first], prepend=-np.inf) > _ONE_PASS_MS)  # of each pass with prompts
    tokens = np.add.reduceat(new[by_first], starts) if len(rows) else new
    ends = first[by_first][np.append(starts, len(rows))[1:] - 1]
    sums = [np.concatenate(([0.0], np.cumsum(column))) for column in (tokens * tokens, tokens, np.ones_like(tokens))]
    after = np.searchsorted(ends, first, side="left") + 1
    until = np.maximum(np.searchsorted(ends, last, side="right"), after)
    sequences, lengths = _under_way(first, last, inputs + 1, outputs - 1)
    steps = outputs - 1
    at = np.flatnonzero((steps > 0) & (last > first))
    prompts = np.column_stack([(column[until] - column[after])[at] / steps[at] for column in sums])
    between = np.column_stack((prompts, sequences[at], lengths[at], np.ones(len(at)), -prompts[:, 2]))
    alone = _alone(arrival, first, last)
    zeros = np.zeros((len(alone), 4))
    to_first = np.column_stack((new[alone] ** 2, new[alone], np.ones(len(alone)), zeros))
    return Observations(
        "requests",
        np.concatenate(((last - first)[at] / steps[at], (first - arrival)[alone])),
        np.concatenate((between, to_first)),
    )


def _record(line: str, where: str) -> tuple[float, ...] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{where}: expected one JSON object, got {line[:60]!r}: {error}") from None
    if not isinstance(found, dict):
        raise InvalidInput(f"{where}: expected one JSON object, got {line[:60]!r}")
    if found.get("first_token_ms", math.nan) is None:
        return None
    values = []
    for field in _FIELDS:
        value = found.get(field)
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= 2**53:
            raise InvalidInput(f"{where}: {field}: expected a number, got {value!r:.80}")
        values.append(float(value))
    for field, value, least in zip(_FIELDS[1:], values[1:], (values[0], values[1], 1.0, 1.0, 0.0), strict=True):
        if value < least:
            raise InvalidInput(f"{where}: {field}: expected {least:g} or more, got {value:g}")
    if values[5] > values[3]:
        raise InvalidInput(
            f"{where}: reused_input_tokens: expected at most input_length, {values[3]:g}, got {values[5]:g}"
        )
    return tuple(values)


def _under_way(first: Floats, last: Floats, length: Floats, growth: Floats) -> tuple[Floats, Floats]:
    """How many sequences decode while each does, and the sum of their lengths: the means over its time."""
    n, span = len(first), last - first
    slope = np.divide(growth, span, out=np.zeros(n), where=span > 0)
    times = np.concatenate((first, last))
    order = np.argsort(times, kind="stable")
    gaps = np.diff(times[order], append=times.max(initial=0.0))
    count = np.cumsum(np.concatenate((np.ones(n), -np.ones(n)))[order])
    rise = np.cumsum(np.concatenate((slope, -slope))[order])
    jumps = np.concatenate((length, -(length + growth)))[order]
    total = np.cumsum(jumps + np.concatenate(([0.0], (rise * gaps)[:-1])))
    place = np.empty(2 * n, dtype=np.intp)
    place[order] = np.arange(2 * n)
    means = []
    for areas in (count * gaps, total * gaps + rise * gaps * gaps / 2):
        before = np.concatenate(([0.0], np.cumsum(areas)))
        means.append(np.divide(before[place[n:]] - before[place[:n]], span, out=np.zeros(n), where=span > 0))
    return means[0], means[1]


def _alone(arrival: Floats, first: Floats, last: Floats) -> NDArray[np.intp]:
    """Requests that had the server for themselves from their arrival to their first token."""
    arrivals, ends = np.sort(arrival), np.sort(last)
    came = np.searchsorted(arrivals, first, side="left")  # before its first token, itself among them
    went = np.searchsorted(ends, arrival, side="right")
    return np.flatnonzero(came - went == 1)
