"""A paged engine of nothing but pages: K and V apart, ranks with a cache each, and requests that are put in by hand."""

from __future__ import annotations

import itertools
import operator
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kvist.engines.paged import answers
from kvist.engines.paged.checkouts import Checkouts
from kvist.engines.paged.matching import Stored
from kvist.engines.paged.mover import PageMover
from kvist.engines.paged.pages import GroupPages
from kvist.engines.paged.plans import CapturePlan, Load, Place, SequencePlan
from kvist.errors import NotFound
from kvist.hashing import extend_block_hashes
from kvist.layout import Layout

SIZE = 4
BLOCKS = 24
LAYOUT = Layout(
    page_size_tokens=SIZE, n_layers=3, n_heads=2, head_dim=5, dtype="f32", model="plain", revision="1",
    memory_order="LNHD",
)  # fmt: skip


@dataclass
class Request:
    """Tokens, those that are computed, and where."""

    name: str
    token_ids: list[int]
    cached: int
    blocks: list[int]

    @property
    def names(self) -> list[bytes]:
        """Of its full blocks."""
        names: list[bytes] = []
        extend_block_hashes(names, self.token_ids[: self.cached], SIZE)
        return names


class Rank:
    """One rank: a cache, and what moves its pages."""

    def __init__(self, layout: Layout, store: str, cache_bytes: int | None) -> None:
        shape = BLOCKS, 1, SIZE, layout.n_heads, layout.head_dim
        self.layers = [(torch.randn(shape), torch.randn(shape)) for _ in range(layout.n_layers)]
        self.mover = PageMover([layout], store, 1 << 20, lambda: {"engine": "plain"}, cache_bytes)
        self.mover.register([GroupPages(layout, self.layers, BLOCKS)])

    def page(self, block: int, fill: int = SIZE) -> torch.Tensor:
        """The computed tokens of a page, ``[layers, 2, fill, heads, head_dim]``; a copy."""
        return torch.stack([torch.cat([k[block], v[block]])[:, :fill] for k, v in self.layers])

    def wipe(self) -> None:
        """Lose everything."""
        for half in itertools.chain(*self.layers):
            half.zero_()


class Plain:
    """An `answers.Engine`, and its `Decider`; also a `kvist.server.live.client.Engine`."""

    name = "plain"

    def __init__(self, store: Path, *, ranks: int = 1, cache_bytes: int | None = None) -> None:
        self.store = store.as_uri()
        layouts = [replace(LAYOUT, tp_rank=rank, tp_size=ranks) for rank in range(ranks)]
        self.by_rank = [Rank(layout, self.store, cache_bytes) for layout in layouts]
        self.layouts, self.windows = [layouts[0]], [None]
        self.requests: dict[str, Request] = {}
        self.generation = [0] * BLOCKS
        self.known = Checkouts(self.windows, SIZE)
        self.needs_pause = False
        self.paused = 0
        self.kept: set[str] = set()  # captures that keep their pages in place
        self.loose: list[int] = []  # blocks of its prefix cache that are no request's
        self.lost: list[tuple[int, int]] = []
        self._numbers = itertools.count(1)

    def close(self) -> None:
        for rank in self.by_rank:
            rank.mover.close()

    def add(self, name: str, token_ids: Sequence[int], blocks: Sequence[int]) -> Request:
        """A request, all of whose tokens but the last are computed."""
        request = Request(name, list(token_ids), len(token_ids) - 1, list(blocks))
        self.requests[name] = request
        return request

    def load(self, cid: str, sequence: str, blocks: Sequence[int]) -> None:
        """What a request does that continues a sequence; returns when it is there, or is not."""
        found = self.known.named(cid, sequence, lambda stored: True)
        assert found is not None
        checkout, stored = found
        pages: list[tuple[Place, int | str]] = []
        for number, (ref, block) in enumerate(zip(stored.pages[0], blocks, strict=True)):
            self.generation[block] += 1
            fill = min(SIZE, stored.cached - number * SIZE)
            assert ref is not None
            pages.append((Place(0, block, self.generation[block], fill), ref))
        self.bring(Load("request", checkout.content, pages))

    def bring(self, load: Load) -> None:
        for rank in self.by_rank:
            ended = rank.mover.arrivals.ended
            rank.mover.load([load])
            while rank.mover.arrivals.ended == ended:
                time.sleep(0.001)

    # -- answers.Engine ------------------------------------------------------------------------------------------

    @property
    def decider(self) -> Plain:
        return self

    def must_pause(self, wanted: str | None) -> bool:
        return self.needs_pause

    def begin(self, plan: CapturePlan) -> None:
        self.ranks("captures.begin", plan)

    def ranks(self, method: str, *args: Any) -> list[Any]:
        return [operator.attrgetter(method)(rank.mover)(*args) for rank in self.by_rank]

    # -- answers.Decider -----------------------------------------------------------------------------------------

    @property
    def checkouts(self) -> list[str]:
        return self.known.cids

    def content(self, cid: str) -> str:
        return self.known.content(cid)

    def check_out(
        self, cid: str, content: str, by_hash: list[dict[bytes, int]], sequences: Sequence[Stored]
    ) -> list[str]:
        return self.known.add(cid, content, by_hash, sequences)

    def capture(self, wanted: str | None) -> CapturePlan:
        chosen = [each for each in self.requests.values() if wanted in (None, each.name)]
        if wanted is not None and not chosen:
            raise NotFound(f"no request {wanted}")
        places: dict[int, Place] = {}
        for each in chosen:
            for number, block in enumerate(each.blocks):
                fill = min(SIZE, each.cached - number * SIZE)
                name = each.names[number].hex() if number < len(each.names) else None
                places[block] = Place(0, block, self.generation[block], fill, name)
        for block in self.loose if wanted is None else ():
            places[block] = Place(0, block, self.generation[block], SIZE, f"{block:064x}")
        sequences = [
            SequencePlan(each.name, each.name, each.token_ids, each.cached, [(0, each.blocks)], {}) for each in chosen
        ]
        name = f"capture-{next(self._numbers)}"
        self.kept.add(name)
        return CapturePlan(name, list(places.values()), sequences)

    def gone(self, capture: str) -> list[tuple[int, int]]:
        return self.lost

    def release(self, capture: str) -> None:
        self.kept.discard(capture)

    # -- live.client.Engine --------------------------------------------------------------------------------------

    def option(self, name: str) -> str | None:
        return None

    def request_of(self, sequence: str) -> str:
        return sequence

    async def call(self, op: str, payload: Mapping[str, Any]) -> Mapping[str, Any]:
        return answers.answer(op, lambda: answers.call(self, op, payload))

    async def pause(self) -> None:
        self.paused += 1
        self.needs_pause = False

    async def resume(self) -> None:
        self.paused += 1

    async def is_paused(self) -> bool:
        return False
