"""One owner's view of an engine: its own sequences under their own names, and blocks that only it shares.

Knows names and the engine's calls. Must not know who owners are, or where their snapshots lie.

Several owners share an engine's model and its room, and nothing else: an owner's sequences have names that begin with
its own in the engine, so that no other view finds, lists, resumes or drops them, and its block hashes are salted, so
that no other one's prompt is ever found in a page of its. What an owner can still see of the others is how much room
there is, and how long it waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Ids
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from kvist.cartridge.placing import Prefix
from kvist.engines.hf.cartridges import Cartridges
from kvist.engines.hf.engine import Engine
from kvist.engines.hf.model import Model
from kvist.engines.hf.pool import PagePool
from kvist.engines.hf.sampling import SamplingParams
from kvist.engines.hf.scheduler import Scheduler
from kvist.engines.hf.sequence import Event, Request, Sequence, SequenceInfo
from kvist.errors import NotFound
from kvist.layout import Layout

_NAMED: Final = "tenants/"
"""What the names of owned sequences begin with in the engine; no sequence of nobody's does."""


@dataclass(frozen=True, slots=True, repr=False)
class Owner:
    """Whose sequences.

    Attributes:
        name: one segment of a name; ``None``: nobody's in particular.
        salt: of its block hashes; a secret.
    """

    name: str | None = None
    salt: str = ""

    def inner(self, name: str) -> str:
        """What its sequence ``name`` is called in the engine.

        Raises:
            NotFound: it can have none of that name.
        """
        if self.name is not None:
            return f"{_NAMED}{self.name}/{name}"
        if name.startswith(_NAMED):
            raise NotFound(f"no sequence {name!r:.200} in the engine")
        return name

    def outer(self, inner: str) -> str | None:
        """What it calls a sequence of the engine; ``None``: that is not its own."""
        if self.name is None:
            return None if inner.startswith(_NAMED) else inner
        start = f"{_NAMED}{self.name}/"
        return inner.removeprefix(start) if inner.startswith(start) else None

    def owned(self, sequences: Iterator[Sequence]) -> Iterator[tuple[str, Sequence]]:
        """Those of these sequences that are its own, and what it calls them."""
        for seq in sequences:
            name = self.outer(seq.id)
            if name is not None:
                yield name, seq

    def __repr__(self) -> str:
        return f"Owner({self.name!r})"


class OwnedEngine:
    """What of an `Engine` an owner may use: as an engine to the server, and to `HfPager`.

    Attributes:
        owner: whose view it is.
    """

    def __init__(self, engine: Engine, owner: Owner) -> None:
        self._engine = engine
        self.owner: Final = owner

    @property
    def model(self) -> Model:
        """The model."""
        return self._engine.model

    @property
    def layout(self) -> Layout:
        """Of every page."""
        return self._engine.layout

    @property
    def max_model_len(self) -> int:
        """Tokens a sequence may have."""
        return self._engine.max_model_len

    @property
    def cartridges(self) -> Cartridges:
        """What requests may begin with: every owner's."""
        return self._engine.cartridges

    @property
    def pool(self) -> PagePool:
        """All slots; for `HfPager`, in `exclusive` only."""
        return self._engine.pool

    def numerics(self) -> dict[str, Any]:
        """What besides the layout decides the bits."""
        return self._engine.numerics()

    def stats(self) -> dict[str, int]:
        """Counters and gauges of the whole engine."""
        return self._engine.stats()

    def pause(self) -> None:
        """See `EngineThread.pause`."""
        self._engine.pause()

    def resume(self) -> None:
        """See `EngineThread.resume`."""
        self._engine.resume()

    @contextmanager
    def exclusive(self) -> Iterator[Scheduler]:
        """See `EngineThread.exclusive`; for `HfPager`."""
        with self._engine.exclusive() as scheduler:
            yield scheduler

    def submit(
        self,
        token_ids: Ids[int],
        params: SamplingParams | None = None,
        *,
        sequence_id: str,
        resume: str | None = None,
        override: Mapping[str, Any] | None = None,
        cartridge: str | Prefix | None = None,
        on_step: Callable[[Event], None] | None = None,
    ) -> Request:
        """See `Engine.submit`."""
        return self._engine.submit(
            token_ids,
            params,
            sequence_id=self.owner.inner(sequence_id),
            resume=None if resume is None else self.owner.inner(resume),
            override=override,
            cartridge=cartridge,
            on_step=on_step,
            salt=self.owner.salt,
        )

    def sequences(self) -> list[SequenceInfo]:
        """See `Engine.sequences`."""
        named = [(self.owner.outer(info.id), info) for info in self._engine.sequences()]
        return [replace(info, id=name) for name, info in named if name is not None]

    def drop(self, sequence_id: str) -> None:
        """See `Engine.drop`."""
        try:
            self._engine.drop(self.owner.inner(sequence_id))
        except NotFound:
            raise NotFound(f"no sequence {sequence_id!r:.200} in the engine") from None


AnyEngine = Engine | OwnedEngine
"""An engine, or an owner's view of one."""
