"""`Trace`: the requests of a trace in columns; and `TraceBuilder`, which makes one of rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvist.errors import InvalidInput

MOONCAKE_BLOCK_SIZE: Final = 512
"""Tokens of a trace block where nothing else is said."""

MAX_TOKENS: Final = 2**31 - 1
"""Of a prompt, and of an output."""

MAX_MS: Final = 1e12
"""Longest time from the first arrival to the last, and longest delay: 31 years; int64 nanoseconds hold 292."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Requests in the order in which they come. The arrays are read-only, and as long as there are requests.

    Attributes:
        name: of the file, without its suffixes.
        block_size: tokens of one trace block.
        arrival_ms: when it comes; the first at 0. NaN: it comes after `previous`, or no time was given.
        input_tokens: of the prompt, 1 or more.
        output_tokens: to generate, 0 or more.
        offsets: request ``r`` has ``block_ids[offsets[r]:offsets[r + 1]]``; one longer than there are requests.
        block_ids: content of the trace blocks, of all requests one after the other. Enough to hold the prompt.
        previous: number of the request after whose end it comes, always a smaller one; -1: none.
        delay_ms: how long after; 0 where there is no `previous`.
        request_ids: their names, all different.

    Raises:
        InvalidInput: the columns do not fit together.
    """

    name: str
    block_size: int
    arrival_ms: Floats
    input_tokens: Ints
    output_tokens: Ints
    offsets: Ints
    block_ids: Ints
    previous: Ints
    delay_ms: Floats
    request_ids: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.block_size <= MAX_TOKENS:
            raise InvalidInput(f"trace {self.name}: block_size: expected 1 to {MAX_TOKENS}, got {self.block_size}")
        rows = len(self.input_tokens)
        for column in fields(self)[2:]:
            values = getattr(self, column.name)
            expected = {"offsets": rows + 1, "block_ids": self.offsets[-1] if len(self.offsets) else 0}
            if len(values) != expected.get(column.name, rows):
                raise InvalidInput(
                    f"trace {self.name}: {column.name}: expected {expected.get(column.name, rows)} values, "
                    f"got {len(values)}"
                )
            if isinstance(values, np.ndarray):
                values.flags.writeable = False
        for column_name, is_wrong, expectation in self._rules():
            found = np.flatnonzero(is_wrong)
            if len(found):
                row = int(found[0])
                value = getattr(self, column_name)[row]
                raise InvalidInput(
                    f"trace {self.name}, request {row}: {column_name}: expected {expectation}, got {value}"
                )
        if len(set(self.request_ids)) != rows:
            raise InvalidInput(f"trace {self.name}: request_ids: expected all to differ, got one twice")

    def _rules(self) -> Iterator[tuple[str, NDArray[np.bool_], str]]:
        row = np.arange(len(self))
        capacity = np.diff(self.offsets) * self.block_size
        follows = self.previous >= 0
        yield "input_tokens", (self.input_tokens < 1) | (self.input_tokens > MAX_TOKENS), f"1 to {MAX_TOKENS}"
        yield "input_tokens", self.input_tokens > capacity, "no more than its block_ids hold"
        yield "output_tokens", (self.output_tokens < 0) | (self.output_tokens > MAX_TOKENS), f"0 to {MAX_TOKENS}"
        yield "previous", (self.previous < -1) | (self.previous >= row), "-1 or an earlier request"
        yield "arrival_ms", follows & ~np.isnan(self.arrival_ms), "NaN, for it has a previous"
        yield "arrival_ms", (self.arrival_ms < 0) | (self.arrival_ms > MAX_MS), f"0 to {MAX_MS:g}"
        yield "delay_ms", ~((self.delay_ms >= 0) & (self.delay_ms <= MAX_MS)), f"0 to {MAX_MS:g}"
        yield "delay_ms", ~follows & (self.delay_ms != 0), "0, for it has no previous"
        if self.has_arrivals:
            latest = np.maximum.accumulate(np.where(follows, 0.0, self.arrival_ms))
            yield "arrival_ms", self.arrival_ms < latest, "no less than that of an earlier request"

    def __len__(self) -> int:
        """How many requests it has."""
        return len(self.input_tokens)

    @property
    def has_arrivals(self) -> bool:
        """Whether it says of every request when it comes. If not, it can be replayed in a closed loop only."""
        return not bool(np.any(np.isnan(self.arrival_ms) & (self.previous < 0)))

    def blocks(self, request: int) -> Ints:
        """Ids of the trace blocks of one request."""
        return self.block_ids[self.offsets[request] : self.offsets[request + 1]]

    def head(self, count: int) -> Trace:
        """The first `count` requests, or all."""
        count = min(max(count, 0), len(self))
        offsets = self.offsets[: count + 1]
        kept: dict[str, Any] = {
            column.name: getattr(self, column.name)[:count]
            for column in fields(self)[2:]
            if column.name not in ("offsets", "block_ids")
        }
        return replace(self, offsets=offsets, block_ids=self.block_ids[: int(offsets[-1])], **kept)


@dataclass(slots=True)
class TraceBuilder:
    """Takes requests in any order of their times, but what comes after another request after that one.

    Attributes:
        block_size: tokens of one trace block.
        request_ids: of the rows so far, and the number of each.
    """

    block_size: int = MOONCAKE_BLOCK_SIZE
    request_ids: dict[str, int] = field(default_factory=dict)
    _times: list[float | None] = field(default_factory=list)
    _inputs: list[int] = field(default_factory=list)
    _outputs: list[int] = field(default_factory=list)
    _blocks: list[Sequence[int]] = field(default_factory=list)
    _previous: list[int] = field(default_factory=list)
    _delays: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        """How many rows it has."""
        return len(self._inputs)

    def add(
        self,
        input_tokens: int,
        output_tokens: int,
        blocks: Sequence[int],
        *,
        arrival_ms: float | None = None,
        previous: int = -1,
        delay_ms: float = 0.0,
        request_id: str | None = None,
    ) -> int:
        """Add a request, and return its row.

        Args:
            input_tokens: of the prompt.
            output_tokens: to generate.
            blocks: content of the trace blocks, 0 to 2**64 - 1; kept, not copied.
            arrival_ms: from any origin; not used where there is a `previous`.
            previous: row after whose end it comes, or -1.
            delay_ms: how long after.
            request_id: a name that no other row has; else the number of the row.

        Raises:
            InvalidInput: another row has the name.
        """
        row = len(self)
        if self.request_ids.setdefault(str(row) if request_id is None else request_id, row) != row:
            raise InvalidInput(f"request_id: expected a name that no earlier request has, got {request_id!r}")
        self._times.append(arrival_ms if previous < 0 else None)
        self._inputs.append(input_tokens)
        self._outputs.append(output_tokens)
        self._blocks.append(blocks)
        self._previous.append(previous)
        self._delays.append(delay_ms)
        return row

    def build(self, name: str) -> Trace:
        """Sort by time, keeping the order of equal ones, and move the first arrival to 0.

        Raises:
            InvalidInput: see `Trace`.
        """
        previous = np.array(self._previous, np.int64)
        delay = np.array(self._delays, np.float64)
        starts = previous < 0
        arrival = np.array([np.nan if time is None else time for time in self._times], np.float64)
        if not np.all(np.isnan(arrival)):
            arrival -= np.nanmin(arrival)
        order = np.arange(len(self))
        if not np.any(np.isnan(arrival[starts])):
            due = arrival.copy()
            for row in np.flatnonzero(~starts).tolist():
                due[row] = due[previous[row]] + delay[row]  # the soonest that it can be
            order = np.argsort(due, kind="stable")
        place = np.append(np.argsort(order), -1)  # of a row; and of none
        rows = order.tolist()
        blocks = [self._blocks[row] for row in rows]
        names = list(self.request_ids)
        return Trace(
            name=name,
            block_size=self.block_size,
            arrival_ms=arrival[order],
            input_tokens=np.array(self._inputs, np.int64)[order],
            output_tokens=np.array(self._outputs, np.int64)[order],
            offsets=np.cumsum([0, *map(len, blocks)], dtype=np.int64),
            block_ids=_signed(np.fromiter(itertools.chain.from_iterable(blocks), np.uint64)),
            previous=place[previous[order]],
            delay_ms=delay[order],
            request_ids=tuple(names[row] for row in rows),
        )


def _signed(ids: NDArray[np.uint64]) -> Ints:
    """The ids as int64; numbered anew where they are too large for it."""
    if len(ids) and int(ids.max()) >= 2**63:
        return np.unique(ids, return_inverse=True)[1].astype(np.int64)
    return ids.astype(np.int64)
