"""The last requests of a server, with what they found in the cache: for the page, and for curves of its own traffic.

Knows pieces and prompts; must not know HTTP, engines or how curves are drawn.
"""

from __future__ import annotations

import itertools
import threading
import time
from array import array
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

import xxhash

from kvist.server.delivery import Generating
from kvist.server.generation import Piece
from kvist.telemetry import kind_of

KEPT: Final = 200
"""Requests that are remembered one by one."""
CHAINS_MAX: Final = 1 << 20
"""Blocks of prompts that are remembered for curves: 8 MiB."""
PROMPTS_MAX: Final = 10_000
"""Prompts that are, however short."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One request that has ended.

    Attributes:
        id: of the answer.
        ended: seconds since the epoch.
        kind: ``"chat"`` or ``"completion"``.
        begun_with: the snapshot or cartridge that it went on from; ``""``: neither.
        prompt_tokens, cached_tokens, completion_tokens: as its ``usage`` says.
        first_s: seconds to its first token; ``None``: there was none.
        total_s: seconds to its end.
        outcome: its finish reasons, or the kind of its error.
    """

    id: str
    ended: float
    kind: str
    begun_with: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    first_s: float | None
    total_s: float
    outcome: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a curve needs of a request.

    Attributes:
        tokens: of the prompt.
        blocks: names of its blocks, each of the block and all before it; the last may not be full.
    """

    tokens: int
    blocks: array[int]


class Recent:
    """The last requests. Thread-safe.

    Attributes:
        block_size: tokens of a block, for the prompts.
    """

    def __init__(self, block_size: int, *, tell: Callable[[Answered], None] = lambda _: None) -> None:
        """``tell`` is called with each request that has ended."""
        self.block_size = block_size
        self._tell = tell
        self._lock = threading.Lock()
        self._answered: deque[Answered] = deque(maxlen=KEPT)
        self._prompts: deque[Prompt] = deque()
        self._blocks = 0

    def requests(self) -> list[Answered]:
        """The last requests, newest first."""
        with self._lock:
            return [*reversed(self._answered)]

    def prompts(self) -> list[Prompt]:
        """The last prompts, in the order in which their requests ended."""
        with self._lock:
            return list(self._prompts)

    def prompt(self, ids: Sequence[int]) -> Prompt:
        """A prompt as it is remembered; of a long one, milliseconds of work."""
        return Prompt(len(ids), chain(ids, self.block_size))

    def note(self, answered: Answered, prompts: Sequence[Prompt]) -> None:
        """Remember a request and its prompts."""
        kept = [prompt for prompt in prompts if prompt.tokens]
        with self._lock:
            self._answered.append(answered)
            self._prompts.extend(kept)
            self._blocks += sum(len(prompt.blocks) for prompt in kept)
            while self._blocks > CHAINS_MAX or len(self._prompts) > PROMPTS_MAX:
                self._blocks -= len(self._prompts.popleft().blocks)
        self._tell(answered)

    def watch(
        self, generation: Generating, *, id: str, kind: str, begun_with: str, prompts: Sequence[Prompt]
    ) -> Generating:
        """``generation``, remembered when it ends, however it ends.

        Args:
            generation: what a request gets.
            id, kind, begun_with: see `Answered`.
            prompts: each of its prompts, once.
        """
        return _Watched(generation, self, id, kind, begun_with, prompts)


class _Watched(Generating):
    def __init__(
        self,
        generation: Generating,
        recent: Recent,
        id: str,
        kind: str,
        begun_with: str,
        prompts: Sequence[Prompt],
    ) -> None:
        self._generation, self._recent = generation, recent
        self._about = id, kind, begun_with
        self._prompts = prompts
        self._started = time.perf_counter()

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        first: float | None = None
        reasons: dict[str, None] = {}
        try:
            async with aclosing(self._generation.pieces()) as pieces:
                async for piece in pieces:
                    if first is None and piece.steps:
                        first = time.perf_counter() - self._started
                    if piece.finish_reason is not None:
                        reasons[piece.finish_reason] = None
                    yield piece
        except BaseException as failure:
            reasons = {kind_of(failure): None}
            raise
        finally:
            self._note(first, ", ".join(reasons))

    def cancel(self) -> None:
        self._generation.cancel()

    def usage(self, prompts: int) -> dict[str, Any]:
        return self._generation.usage(prompts)

    def _note(self, first: float | None, outcome: str) -> None:
        usage = self.usage(len(self._prompts))
        request_id, kind, begun_with = self._about
        answered = Answered(
            id=request_id,
            ended=time.time(),
            kind=kind,
            begun_with=begun_with,
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
            completion_tokens=usage["completion_tokens"],
            first_s=first,
            total_s=time.perf_counter() - self._started,
            outcome=outcome,
        )
        self._recent.note(answered, self._prompts)


def chain(ids: Sequence[int], block_size: int) -> array[int]:
    """Names of the blocks of a prompt, the last of which may not be full: equal where it and all before it are equal.

    64 bits, as a trace's ``hash_ids``: good for counting, and for nothing that must not be fooled.
    """
    data = memoryview(array("I", ids)).cast("B")
    step = block_size * array("I").itemsize
    parts = (data[start : start + step] for start in range(0, len(data), step))
    names = itertools.accumulate(parts, lambda name, part: xxhash.xxh3_64_intdigest(part, name), initial=0)
    return array("Q", itertools.islice(names, 1, None))
