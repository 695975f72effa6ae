"""Sequences, and the requests that wait for what they produce.

Knows tokens, tables and queues. Must not know models, pools or scheduling.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kvist.cartridge.placing import Prefix
from kvist.engines.hf.cartridges import Hold
from kvist.engines.hf.sampling import Row, SamplingParams
from kvist.errors import InvalidInput
from kvist.hashing import block_root, extend_block_hashes
from kvist.pager import LogicalSeq
from kvist.pager.carry import NUMERICS

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """One generated token.

    Attributes:
        token_id: the token.
        logprob: its log probability under the model, before temperature and truncation.
        top: the likeliest ids with their log probabilities, as many as ``SamplingParams.logprobs`` asks.
        logits: float32 ``[vocabulary]`` that it was chosen from, if ``SamplingParams.logits``.
        finish_reason: set on the last token of a request.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    logits: Row | None = None
    finish_reason: FinishReason | None = None


Event = StepOutput | Exception | None
"""What a request delivers: tokens, then ``None`` at the end, or the exception that ended it."""


class Request:
    """What a caller holds of a submitted sequence. Iterate it, from one thread, for its `StepOutput`s.

    Attributes:
        id: of the sequence, by which it can be resumed, dropped and captured.
        prompt_tokens: tokens it started with (all of them, for a resumed sequence), but for those of a cartridge that
            was placed before them.
        cached_tokens: how many of those came out of the pool or a cartridge and were not computed; 0 until it is
            admitted, final when the first output is there. A sequence that had to give up its pages does not count
            them again.
        cartridge: what the sequence begins with, or ``None``.
        finish_reason: ``None`` while it runs, and after an error.
    """

    def __init__(
        self,
        sequence_id: str,
        prompt_tokens: int,
        on_step: Callable[[Event], None] | None,
        cartridge: Prefix | None = None,
    ) -> None:
        self.id = sequence_id
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = 0
        self.cartridge = cartridge
        self.finish_reason: FinishReason | None = None
        self.cancelled = False
        self.finishing = False
        self._on_step = on_step
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._ended = False

    def cancel(self) -> None:
        """Ask the engine to end the sequence before its next step, and to give up its pages. It may be over already."""
        self.cancelled = True

    def finish(self) -> None:
        """From ``on_step`` only: end the sequence after the token in hand, as a stop token would; it stays resident."""
        self.finishing = True

    def deliver(self, event: Event) -> None:
        """Hand ``event`` to the caller; the engine's side of the request."""
        if self._on_step is None:
            self._events.put(event)
        else:
            self._on_step(event)

    def __iter__(self) -> Iterator[StepOutput]:
        """The outputs not yet taken, as they come.

        Raises:
            KvistError: (or whatever a step raised) the request failed.
            InvalidInput: it has an ``on_step``, which gets the outputs.
        """
        if self._on_step is not None:
            raise InvalidInput(f"request {self.id} delivers to on_step and cannot be iterated too")
        while not self._ended:
            event = self._events.get()
            self._ended = not isinstance(event, StepOutput)
            if isinstance(event, Exception):
                raise event
            if event is not None:
                yield event

    def result(self) -> list[StepOutput]:
        """Wait for the end; the outputs not yet taken."""
        return list(self)


@dataclass(frozen=True, slots=True)
class SequenceInfo:
    """A sequence as `Engine.sequences` lists it.

    Attributes:
        id: its name.
        status: ``resident`` (finished or restored), ``running``, or ``waiting`` (for pages).
        tokens: ids it has, with those of a cartridge.
        computed: of these, how many have keys and values in the pool.
        prompt_tokens: ids before the first generated one, with those of a cartridge.
        pages: slots in its table; some may be shared.
        cartridge: name of the cartridge that it begins with, or ``None``.
    """

    id: str
    status: Literal["resident", "running", "waiting"]
    tokens: int
    computed: int
    prompt_tokens: int
    pages: int
    cartridge: str | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """A growing list of ids, and the slots that hold its keys and values.

    Attributes:
        id: its name in the engine.
        token_ids: of the cartridge, the prompt, and what was generated; empty where a restored sequence came without.
        params: how to go on.
        draws: random draws made so far.
        prompt_tokens: tokens before the first generated one.
        limit: ids it may grow to.
        arrival: order of submission; the latest gives up its pages first.
        request: who waits for it; ``None`` once finished.
        parent: sequence whose pages to start from, if it is still there.
        table: slots in token order; exactly as many as ``computed`` tokens need.
        computed: tokens whose keys and values the table holds.
        admitted: has run; it is worth listing and capturing.
        foreign_state: state it was restored with, kept as it came.
        prefix: the cartridge that it begins with, or ``None``.
        hold: on the cartridge's pages, as long as it is live.
        owner_salt: of whose it is; ``""``: nobody's in particular.
        numerics: digest of those that computed its first pages, see `kvist.pager.carry.NUMERICS`; ``""``: the engine's.
    """

    id: str
    token_ids: list[int]
    params: SamplingParams
    prompt_tokens: int
    draws: int = 0
    limit: int = 0
    arrival: int = 0
    request: Request | None = None
    parent: str | None = None
    table: list[int] = field(default_factory=list)
    computed: int = 0
    admitted: bool = False
    foreign_state: dict[str, Any] | None = None
    prefix: Prefix | None = None
    hold: Hold | None = None
    owner_salt: str = ""
    numerics: str = ""
    _hashes: list[bytes] = field(default_factory=list)

    @property
    def salt(self) -> str:
        """Of its block hashes: sequences with other salts share no page with it."""
        own = self.prefix.salt if self.prefix is not None else ""
        if self.numerics:
            own = f"numerics:{self.numerics}:{own}"
        return f"{self.owner_salt}:{own}" if self.owner_salt else own

    @property
    def own(self) -> int:
        """First position that is the client's, after a cartridge placed before it."""
        return self.prefix.own if self.prefix is not None else 0

    @property
    def given(self) -> int:
        """First tokens that are the cartridge's and never computed; the last token is computed for its logits."""
        return min(self.prefix.tokens, len(self.token_ids) - 1) if self.prefix is not None else 0

    def hashes(self, page_size: int) -> list[bytes]:
        """Block hashes of the full blocks of ``token_ids``, salted; not to be changed."""
        extend_block_hashes(self._hashes, self.token_ids, page_size, salt=self.salt)
        return self._hashes

    def before(self, page: int, page_size: int) -> bytes:
        """What comes before a page: the hash of the block before it, or of nothing under the sequence's salt."""
        return self.hashes(page_size)[page - 1] if page else block_root(self.salt)

    def let_go(self) -> None:
        """Give up the hold on the cartridge."""
        if self.hold is not None:
            self.hold.close()
            self.hold = None

    def state(self) -> dict[str, Any]:
        """What a continuation needs besides ids and pages; JSON."""
        if self.foreign_state is not None:
            return self.foreign_state
        state = {"sampling": self.params.state(), "draws": self.draws, "prompt_tokens": self.prompt_tokens}
        apart = {NUMERICS: self.numerics} if self.numerics else {}
        return state | apart | ({"cartridge": self.prefix.to_dict()} if self.prefix is not None else {})

    def logical(self, page_size: int) -> LogicalSeq:
        """As a pager tells it."""
        return LogicalSeq(
            id=self.id,
            page_ixs=tuple(self.table),
            fill_in_last_page=self.computed % page_size,
            token_ids=tuple(self.token_ids),
            state=self.state(),
        )


def restored(seq: LogicalSeq, page_size: int, owner_salt: str = "") -> Sequence:
    """The finished sequence that ``seq`` describes; its slots are not held yet.

    Raises:
        InvalidInput: its state names a cartridge, or numerics, in a way that cannot be read.
    """
    numerics = seq.state.get(NUMERICS, "")
    if not isinstance(numerics, str):
        raise InvalidInput(f"expected a state's {NUMERICS} to be a digest, got {numerics!r:.200}")
    return Sequence(
        id=seq.id,
        token_ids=list(seq.token_ids),
        params=SamplingParams(),
        prompt_tokens=len(seq.token_ids),
        table=list(seq.page_ixs),
        computed=seq.cached_tokens(page_size),
        admitted=True,
        foreign_state=dict(seq.state),
        prefix=Prefix.of_state(seq.state),
        owner_salt=owner_salt,
        numerics=numerics,
    )


def continuation(source: Sequence, params: SamplingParams, override: Mapping[str, Any]) -> Sequence:
    """A nameless sequence that goes on where ``source`` is, with its generator.

    Args:
        source: stays as it is.
        params: its ``max_tokens``, ``logprobs`` and ``logits`` count; the rest comes from the source's state.
        override: other parameters to change, by name; a seed that differs begins with its first draw.

    Raises:
        InvalidInput: the source has no token ids, or its state cannot be read.
    """
    if not source.token_ids:
        raise InvalidInput(f"sequence {source.id!r} was restored without token ids; it cannot be continued")
    state = source.state()
    sampling, draws = state.get("sampling", {}), state.get("draws", 0)
    prompt_tokens = state.get("prompt_tokens", len(source.token_ids))
    if not isinstance(sampling, dict) or type(draws) is not int or type(prompt_tokens) is not int or draws < 0:
        raise InvalidInput(f"sequence {source.id!r} has a state that cannot be read: {state!r:.200}")
    carried = params.with_state(sampling)
    return Sequence(
        id="",
        token_ids=list(source.token_ids),
        params=replace(carried, **override),
        prompt_tokens=prompt_tokens,
        draws=draws if override.get("seed", carried.seed) == carried.seed else 0,
        parent=source.id,
        prefix=source.prefix,
        owner_salt=source.owner_salt,
        numerics=source.numerics,
    )
