"""A stand-in for vLLM's engine client with kvist's connector: the calls are answered over pages in memory.

Knows the calls and a real repository, which it opens by url as the engine's workers do. Must not know HTTP or vllm.

Pages are a function of rank, group and the tokens up to their end, as a deterministic engine's are. Blocks are shared
by hash. Nothing is computed: a request is put in with its tokens.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from types import SimpleNamespace
from typing import Any, Final

import msgspec

from kvist.engines.vllm.names import is_called
from kvist.errors import EngineError, InvalidInput, KvistError, NotFound
from kvist.layout import Layout
from kvist.repo import LogicalSeq, Manifest, PageEntry, Repository

LAYOUT: Final = Layout(
    page_size_tokens=4, n_layers=2, n_heads=1, head_dim=4, dtype="f16", model="tiny", revision="1",
    memory_order="vllm-nhd",
)  # fmt: skip
CHECKOUTS_MAX: Final = 64
_SUFFIX: Final = re.compile(r"-[0-9a-f]{8}\Z")

Page = tuple[bytes, bytes]


@dataclass(slots=True)
class FakeRequest:
    """A request in the engine.

    Attributes:
        id: vLLM's.
        token_ids: prompt and output.
        cached: how many of them have KV.
        state: what a snapshot says of it.
        draws: whether it draws with a generator, so that a capture under async scheduling needs a pause.
    """

    id: str
    token_ids: list[int]
    cached: int
    state: dict[str, Any]
    draws: bool = False

    @property
    def name(self) -> str:
        """Its id without the part that vLLM draws."""
        return _SUFFIX.sub("", self.id)


@dataclass(slots=True)
class _Capture:
    requests: list[FakeRequest]
    blocks: list[tuple[int, ...]]
    left: int
    polls: int = 0


@dataclass(slots=True)
class _Checkout:
    payload: dict[str, Any]
    polls: int = 0
    loaded: dict[tuple[int, int, int], Page] = field(default_factory=dict)


class FakeEngineClient:
    """What `kvist.server.vllm` uses of vLLM's ``EngineClient``.

    Attributes:
        vllm_config: with a connector and its store, unless told otherwise.
        layouts: by rank, by group.
        calls: how often each call was made; ``pause`` and ``resume`` among them.
        log: the names of all calls in order.
        failing: errors to answer calls with, by call.
        gates: events that calls wait for, by call.
        paused: whether generation is.
        captures: names of the captures that were not released.
    """

    errored = False

    def __init__(
        self,
        store: str,
        layouts: Sequence[Sequence[Layout]] = ((LAYOUT,),),
        *,
        numerics: dict[str, Any] | None = None,
        async_scheduling: bool = False,
        connector: str | None = "KvistConnector",
    ) -> None:
        transfer = SimpleNamespace(kv_connector=connector, kv_connector_extra_config={"store": store})
        self.vllm_config = SimpleNamespace(kv_transfer_config=transfer if connector else None)
        self.layouts = [list(row) for row in layouts]
        self.calls: Counter[str] = Counter()
        self.log: list[str] = []
        self.failing: dict[str, KvistError | Exception] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.paused = False
        self.captures: dict[str, _Capture] = {}
        self.checkouts: OrderedDict[str, _Checkout] = OrderedDict()
        self._store, self._async = store, async_scheduling
        self._numerics = {"threads": 4, "attention": "avx2"} if numerics is None else numerics
        self._requests: dict[str, FakeRequest] = {}
        self._blocks: dict[tuple[int, ...], int] = {}  # the tokens up to a page's end: its ix
        self._stored: set[tuple[int, ...]] = set()
        self._numbers = itertools.count()
        self._repo: Repository | None = None

    def close(self) -> None:
        """Close the workers' repository."""
        if self._repo is not None:
            self._repo.close()

    # -- the engine ----------------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        token_ids: Sequence[int],
        *,
        cached: int | None = None,
        draws: bool = False,
        **state: Any,
    ) -> FakeRequest:
        """Put a request in, or more tokens into the one of that name; all tokens but the last have KV by default."""
        ids = list(token_ids)
        state = {"prompt_tokens": len(ids), "finished": False, "sampling": {"temperature": 0.0}} | state
        request = FakeRequest(f"{name}-0a1b2c3d", ids, max(len(ids) - 1, 0) if cached is None else cached, state, draws)
        self._requests[name] = request
        size = self.layouts[0][0].page_size_tokens
        for end in range(size, request.cached + size, size):
            self._blocks.setdefault(tuple(ids[: min(end, request.cached)]), next(self._numbers))
        return request

    def page(self, rank: int, group: int, tokens: Sequence[int]) -> Page:
        """The page whose last token is the last of ``tokens``."""
        half = self.layouts[rank][group].page_bytes
        draw = random.Random(f"{rank} {group} {tuple(tokens)}").randbytes
        return draw(half), draw(half)

    def restored(self, cid: str, sequence_id: str) -> list[list[list[Page]]]:
        """The pages that a preload brought in for a sequence: by rank, by group, from its first page on."""
        checkout = self.checkouts[cid]
        (sequence,) = [seq for seq in checkout.payload["sequences"] if seq["id"] == sequence_id]
        return [
            [[checkout.loaded[rank, number, ix] for ix in group["page_ixs"]] for number, group in enumerate(groups)]
            for rank, groups in enumerate([sequence["groups"]] * len(self.layouts))
        ]

    # -- vLLM's engine client ------------------------------------------------------------------------------------

    async def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> list[Any]:
        """As vLLM's: arguments and answers go through msgpack, errors come back as values."""
        if method != "kvist":
            raise NotImplementedError(f"no method {method}")
        op, payload = msgspec.msgpack.decode(msgspec.msgpack.encode(args))
        self.calls[op] += 1
        self.log.append(op)
        if op in self.gates:
            await self.gates[op].wait()
        await asyncio.sleep(0)
        if op in self.failing and not isinstance(self.failing[op], KvistError):
            raise self.failing[op]
        return [msgspec.msgpack.decode(msgspec.msgpack.encode(self._answer(op, payload)))]

    async def pause_generation(self, *, mode: str = "abort", clear_cache: bool = True) -> None:
        """As vLLM's, whose defaults would end every request."""
        assert mode == "keep" and not clear_cache
        await asyncio.sleep(0)
        self.log.append("pause")
        self.calls["pause"] += 1
        self.paused = True

    async def resume_generation(self) -> None:
        """As vLLM's."""
        await asyncio.sleep(0)
        self.log.append("resume")
        self.calls["resume"] += 1
        self.paused = False

    async def is_paused(self) -> bool:
        """As vLLM's."""
        return self.paused

    # -- the calls -----------------------------------------------------------------------------------------------

    def _answer(self, op: str, payload: dict[str, Any]) -> dict[str, Any]:
        ops: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "describe": self._describe,
            "begin": self._begin,
            "copy": self._copy,
            "finish": self._finish,
            "release": self._release,
            "checkout": self._checkout,
            "checkouts": lambda _: {"cids": list(self.checkouts)},
            "preload": self._preload,
        }
        try:
            if op in self.failing:
                raise self.failing[op]
            if op not in ops:
                raise InvalidInput(f"unknown call {op!r}")
            return ops[op](payload)
        except KvistError as error:
            return {"error": {"kind": error.kind, "message": str(error), "hint": error.hint}}

    @property
    def _workers(self) -> Repository:
        if self._repo is None:
            self._repo = Repository.open(self._store, create=True)
        return self._repo

    def _describe(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "layouts": [[asdict(layout) for layout in row] for row in self.layouts],
            "numerics": self._numerics,
        }

    def _begin(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        wanted = payload["request_id"]
        chosen = [each for each in self._requests.values() if wanted is None or is_called(each.name, wanted)]
        if wanted is not None and not chosen:
            raise NotFound(f"no live or recently finished request {wanted!r}", hint="name it by X-Request-Id")
        if self._async and any(each.draws for each in chosen) and not payload.get("paused"):
            return {"needs_pause": True}
        if payload.get("paused") and not self.paused:
            raise EngineError("told that generation is paused, and it is not")
        size = self.layouts[0][0].page_size_tokens
        blocks = {
            tuple(each.token_ids[: min(end, each.cached)])
            for each in chosen
            for end in range(size, each.cached + size, size)
        }
        if wanted is None:
            blocks |= {tokens for tokens in self._blocks if len(tokens) % size == 0}
        name = f"capture-{next(self._numbers)}"
        copies = [FakeRequest(each.id, list(each.token_ids), each.cached, each.state, each.draws) for each in chosen]
        self.captures[name] = _Capture(copies, sorted(blocks), len(blocks - self._stored))
        sequences = [{"id": each.name, "tokens": len(each.token_ids), "cached_tokens": each.cached} for each in chosen]
        return {"needs_pause": False, "capture": name, "pages": len(blocks), "sequences": sequences}

    def _copy(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Every other call finds no room."""
        capture = self._capture(payload)
        capture.polls += 1
        is_busy = bool(capture.left) and capture.polls % 2 == 1
        if not is_busy:
            capture.left = max(capture.left - 3, 0)
        return {"left": capture.left, "busy": is_busy, "pause_ms": 0.25}

    def _finish(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        capture = self._capture(payload)
        if capture.left:
            raise InvalidInput(f"{capture.left} pages are not copied yet")
        capture.polls += 1
        if capture.polls % 2:
            return {"done": False}
        new_bytes = 0
        manifests: list[list[str]] = []
        for rank, row in enumerate(self.layouts):
            manifests.append([])
            for group in range(len(row)):
                manifest, written = self._manifest(capture, rank, group)
                new_bytes += written
                self._workers.objects.put_manifests([manifest])
                manifests[rank].append(manifest.cid)
        copied = len(set(capture.blocks) - self._stored)
        self._stored |= set(capture.blocks)
        groups = len(self.layouts[0])
        return {
            "done": True,
            "manifests": manifests,
            "pages": groups * len(capture.blocks),
            "pages_copied": groups * copied,
            "new_bytes": new_bytes,
        }

    def _manifest(self, capture: _Capture, rank: int, group: int) -> tuple[Manifest, int]:
        layout = self.layouts[rank][group]
        size, window = layout.page_size_tokens, layout.sliding_window
        pages = [self.page(rank, group, tokens) for tokens in capture.blocks]
        put = self._workers.put_pages([half for page in pages for half in page])
        entries = [
            PageEntry(self._blocks[tokens], k, v, _block(tokens) if len(tokens) % size == 0 else None)
            for tokens, k, v in zip(capture.blocks, put.digests[::2], put.digests[1::2], strict=True)
        ]
        sequences = []
        for each in capture.requests:
            ends = range(size, each.cached + size, size)
            ixs = [self._blocks[tuple(each.token_ids[: min(end, each.cached)])] for end in ends]
            first = max(0, each.cached - window + 1) // size if window else 0
            fill = each.cached % size
            sequences.append(
                LogicalSeq(each.name, tuple(ixs[first:]), fill, tuple(each.token_ids), each.state, first_page=first)
            )
        return Manifest(layout, tuple(entries), tuple(sequences), self._numerics), put.new_bytes

    def _release(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        self.captures.pop(payload["capture"], None)
        return {}

    def _capture(self, payload: Mapping[str, Any]) -> _Capture:
        if payload["capture"] not in self.captures:
            raise NotFound(f"no capture {payload['capture']}")
        return self.captures[payload["capture"]]

    def _checkout(self, payload: dict[str, Any]) -> dict[str, Any]:
        cid, groups = payload["cid"], len(self.layouts[0])
        shape = [len(row) for row in payload["manifests"]]
        if shape != [groups] * len(self.layouts) or len(payload["groups"]) != groups:
            raise InvalidInput(f"expected manifests of {len(self.layouts)} ranks, {groups} groups, got {shape}")
        for number, group in enumerate(payload["groups"]):
            ixs = {ix for ix, _ in group["pages"]}
            for seq in payload["sequences"]:
                if not ixs.issuperset(seq["groups"][number]["page_ixs"]):
                    raise InvalidInput(f"sequence {seq['id']} names pages that are not there")
        known = self.checkouts.pop(cid, None)
        self.checkouts[cid] = known if known is not None else _Checkout(payload)
        while len(self.checkouts) > CHECKOUTS_MAX:
            self.checkouts.popitem(last=False)
        return {"ok": True}

    def _preload(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        checkout = self.checkouts.get(payload["cid"])
        if checkout is None:
            raise NotFound(f"snapshot {payload['cid']} is not checked out")
        checkout.polls += 1
        if checkout.polls < 3:
            return {"done": False, "pages": 0, "pages_loaded": 0}
        for rank, row in enumerate(checkout.payload["manifests"]):
            for group, cid in enumerate(row):
                for page in self._workers.manifest(cid).pages:
                    data = self._workers.pages.get(page.k), self._workers.pages.get(page.v)
                    checkout.loaded[rank, group, page.ix] = data
        pages = len(checkout.loaded) // len(self.layouts)
        return {"done": True, "pages": pages, "pages_loaded": pages}


def _block(tokens: Sequence[int]) -> str:
    return sha256(repr(tuple(tokens)).encode()).hexdigest()
