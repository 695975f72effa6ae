"""One HTTP request's choices: submitted to the engine, watched for stop strings, and handed over piece by piece.

Knows the engine's requests, and text as it grows. Must not know HTTP or the shape of any answer.

Tokens become text on the engine's thread, so that a stop string ends its sequence before the next token is computed.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from blake3 import blake3

from kvist.cartridge.placing import Prefix
from kvist.server.text import Detokenizer, StopStrings

if TYPE_CHECKING:
    from kvist.engines.hf import AnyEngine, Request, SamplingParams, StepOutput

SEEDS: Final = 2**63


@dataclass(frozen=True, slots=True)
class Start:
    """Where a choice starts.

    Attributes:
        token_ids: all ids before the first generated one, but for those of a cartridge placed before them.
        params: how to go on.
        resume: a sequence in the engine to continue with its generator, of which ``token_ids`` are the ids and
            ``extra`` more; ``None`` for a new one.
        extra: how many of ``token_ids`` the resumed sequence does not have.
        override: sampling parameters that the resumed sequence does not keep.
        cartridge: what a new one begins with.
        skipped: first ones of ``token_ids`` that a new one leaves out, because a cartridge stands before them.
    """

    token_ids: Sequence[int]
    params: SamplingParams
    resume: str | None = None
    extra: int = 0
    override: Mapping[str, Any] = field(default_factory=dict)
    cartridge: Prefix | None = None
    skipped: int = 0


class Step(Protocol):
    """One generated token, and what the engine says of it; see `kvist.engines.hf.StepOutput`."""

    @property
    def token_id(self) -> int:
        """The token."""

    @property
    def logprob(self) -> float:
        """Its log probability."""

    @property
    def top(self) -> Sequence[tuple[int, float]]:
        """The likeliest ids with their log probabilities."""

    @property
    def logits(self) -> Any:
        """Row of logits, or ``None``."""


@dataclass(slots=True)
class Piece:
    """What came of one choice since the last piece.

    Attributes:
        index: of the choice.
        text: new text, whole characters.
        steps: new tokens, with what the engine says of them.
        offsets: for each, the characters of text before it.
        finish_reason: ``"stop"``, ``"length"`` or (somebody dropped it) ``"abort"``, on the last piece.
    """

    index: int
    text: str = ""
    steps: list[Step] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, other: Piece) -> None:
        """Take up the piece that follows."""
        self.text += other.text
        self.steps += other.steps
        self.offsets += other.offsets
        self.finish_reason = other.finish_reason


class Choice:
    """One sequence of a request. Its methods run on the engine's thread, but for `submit` and `cancel`.

    Attributes:
        start: where it starts.
        request: the engine's handle, once submitted.
    """

    def __init__(
        self,
        index: int,
        sequence_id: str,
        start: Start,
        decode: Callable[[Sequence[int]], str],
        stops: Sequence[str],
        deliver: Callable[[Piece | Exception], None],
    ) -> None:
        self.index, self.sequence_id, self.start = index, sequence_id, start
        self.request: Request | None = None
        self._submitted = threading.Event()
        self._text = Detokenizer(decode, start.token_ids)
        self._stops = StopStrings(stops)
        self._deliver = deliver
        self._length = 0

    def submit(self, engine: AnyEngine) -> None:
        """Queue it; raises what `Engine.submit` raises."""
        start = self.start
        first = len(start.token_ids) - start.extra if start.resume else start.skipped
        self.request = engine.submit(
            start.token_ids[first:],
            start.params,
            sequence_id=self.sequence_id,
            resume=start.resume,
            override=start.override,
            cartridge=start.cartridge,
            on_step=self._on_event,
        )
        self._submitted.set()

    def cancel(self) -> None:
        """End it, if it is not over; its pages are freed."""
        if self.request is not None:
            self.request.cancel()

    def _on_event(self, event: StepOutput | Exception | None) -> None:
        if isinstance(event, Exception):
            self._deliver(event)
        elif event is not None:
            self._on_token(event)
        else:
            self._on_end(self._handle().finish_reason)

    def _on_token(self, step: StepOutput) -> None:
        new = self._text.push(step.token_id)
        piece = Piece(self.index, self._stops.push(new), [step], [self._length])
        self._length += len(new)
        self._deliver(piece)
        if self._stops.found is not None:
            self._handle().finish()

    def _on_end(self, reason: str | None) -> None:
        text = self._stops.push(self._text.flush()) + self._stops.flush()
        if self._stops.found is not None:
            # Also where the engine was about to stop for another reason: the stop string is what ended the text.
            reason = "stop"
        self._deliver(Piece(self.index, text, finish_reason="abort" if reason == "cancelled" else reason))

    def _handle(self) -> Request:
        """The engine's handle; the first events may come before `submit` has returned it on its own thread."""
        self._submitted.wait()
        assert self.request is not None
        return self.request


class Generation:
    """The choices of one HTTP request.

    Attributes:
        id: of the request (``cmpl-...``).
        choices: in order of their index.
        started: set when each choice has run, or ended; from then on the engine lists it.
        completion_tokens: generated so far.
    """

    def __init__(
        self,
        request_id: str,
        starts: Sequence[Start],
        decode: Callable[[Sequence[int]], str],
        stops: Sequence[str],
    ) -> None:
        """Call on the event loop that will iterate `pieces`."""
        self.id = request_id
        names = sequence_ids(request_id, len(starts))
        self.choices = [
            Choice(index, name, start, decode, stops, self._deliver_to(index))
            for index, (name, start) in enumerate(zip(names, starts, strict=True))
        ]
        self.started = asyncio.Event()
        self.completion_tokens = 0
        self._loop = asyncio.get_running_loop()
        self._unstarted = set(range(len(starts)))
        self._arrived: asyncio.Queue[Piece | Exception] = asyncio.Queue()

    def submit(self, engine: AnyEngine) -> None:
        """Queue all choices, or none; raises what `Engine.submit` raises. For a worker thread: it may wait."""
        try:
            for choice in self.choices:
                choice.submit(engine)
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """End whatever still runs."""
        for choice in self.choices:
            choice.cancel()
        self._loop.call_soon_threadsafe(self.started.set)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Every choice's pieces as they come, until all choices have finished. Leaving early cancels the rest.

        Raises:
            KvistError: (or whatever a step raised) a choice failed; the others are cancelled.
        """
        unfinished = len(self.choices)
        try:
            while unfinished:
                piece = await self._arrived.get()
                if isinstance(piece, Exception):
                    raise piece
                unfinished -= piece.finish_reason is not None
                yield piece
        finally:
            if unfinished:
                self.cancel()

    def usage(self, prompts: int) -> dict[str, Any]:
        """OpenAI's token counts; each of the ``prompts`` prompts counts once, however many choices it has."""
        step = len(self.choices) // prompts
        prompted = [choice for choice in self.choices[::step] if choice.request is not None]
        firsts = [choice.request for choice in prompted if choice.request is not None]
        prompt_tokens = sum(request.prompt_tokens for request in firsts) + sum(one.start.skipped for one in prompted)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(request.cached_tokens for request in firsts)},
        }

    def _deliver_to(self, index: int) -> Callable[[Piece | Exception], None]:
        def arrive(piece: Piece | Exception) -> None:
            if isinstance(piece, Piece):
                self.completion_tokens += len(piece.steps)
            self._unstarted.discard(index)
            if not self._unstarted:
                self.started.set()
            self._arrived.put_nowait(piece)

        def deliver(piece: Piece | Exception) -> None:
            self._loop.call_soon_threadsafe(arrive, piece)

        return deliver


def sequence_ids(request_id: str, count: int) -> list[str]:
    """What a request's sequences are called in the engine."""
    return [request_id] if count == 1 else [f"{request_id}/{index}" for index in range(count)]


def derived_seed(seed: int, *place: int) -> int:
    """A seed for a generator that branches off one of ``seed`` at ``place``: always the same, like no other."""
    text = "/".join(map(str, (seed, *place)))
    return int.from_bytes(blake3(b"kvist server seed v1\0" + text.encode()).digest()[:8], "little") % SEEDS


def fresh_seed() -> int:
    """A seed nobody asked for."""
    return secrets.randbelow(SEEDS)
