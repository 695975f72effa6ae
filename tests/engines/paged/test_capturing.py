"""Captures that come to no end: what they hold goes back."""

from __future__ import annotations

import threading
from typing import Any

import torch

from kvist.engines.paged.capturing import Captures, Known
from kvist.engines.paged.pages import GroupPages
from kvist.engines.paged.plans import CapturePlan, Place
from kvist.engines.paged.staging import HostPool
from kvist.errors import StoreError

from .plain import BLOCKS, LAYOUT, SIZE


class Stuck:
    """A repository that holds nothing, and takes pages only once it is let go: then it fails."""

    def __init__(self) -> None:
        self.asked, self.let_go = threading.Event(), threading.Event()
        self.pages: Any = self

    def refresh(self) -> None:
        pass

    def put_pages(self, halves: Any) -> Any:
        self.asked.set()
        self.let_go.wait()
        raise StoreError("the store is gone")


def make_captures(known: Known) -> tuple[Captures, HostPool, Stuck]:
    shape = BLOCKS, 1, SIZE, LAYOUT.n_heads, LAYOUT.head_dim
    group = GroupPages(LAYOUT, [[torch.randn(shape), torch.randn(shape)] for _ in range(LAYOUT.n_layers)], BLOCKS)
    pool, repo = HostPool(8 * group.page_bytes, group.page_bytes), Stuck()
    return Captures([LAYOUT], [group], pool, known, lambda: repo, dict), pool, repo  # type: ignore[arg-type, return-value]


def test_an_engine_that_stands_still_does_not_wait_for_what_is_being_stored() -> None:
    """What the store may have already is copied again, where it would take an earlier capture's end to know."""
    known = Known()
    captures, pool, repo = make_captures(known)
    place = Place(0, 1, 0, SIZE)
    known.learn([place], [("k", "v")])
    captures.begin(CapturePlan("first", [Place(0, 0, 0, SIZE)], []))
    while captures.copy("first", ())["left"]:
        pass
    repo.asked.wait()
    captures.begin(CapturePlan("second", [place], []))
    assert captures.copy("second", ()) == {"left": 1, "busy": True}
    captures.hurry("second")
    assert captures.copy("second", ()) == {"left": 0, "busy": False}
    captures.hurry("second")
    repo.let_go.set()
    captures.close()
    assert len(pool.take(8, wait=False)) == 8


def test_what_waits_to_be_stored_gives_its_slots_back_at_the_end() -> None:
    captures, pool, repo = make_captures(Known())
    plans = [CapturePlan(name, [Place(0, block, 0, SIZE)], []) for block, name in enumerate(("a", "b"))]
    for plan in plans:
        captures.begin(plan)
    for plan in plans:  # the first is being stored, the second waits
        while captures.copy(plan.id, ())["left"]:
            pass
    repo.asked.wait()
    timer = threading.Timer(0.05, repo.let_go.set)
    timer.start()
    captures.close()
    timer.join()
    assert len(pool.take(8, wait=False)) == 8
