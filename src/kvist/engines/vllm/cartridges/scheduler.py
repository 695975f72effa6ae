"""The cartridge connector beside vLLM's scheduler: which blocks of a request are a cartridge's, and are not there yet.

Runs in the engine core's thread. Knows blocks and what the front end marked; must not know files or bytes.

A request begins with the tokens of its cartridge, and its salt names it, so full blocks are found in vLLM's own prefix
cache like any others. What is not there is loaded. That holds anew whenever a request starts again after a preemption.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvist.engines.paged.matching import blocks_of, window_of
from kvist.engines.paged.plans import Load, Place
from kvist.engines.vllm import internals, requests
from kvist.engines.vllm.cartridges.messages import InjectPlan
from kvist.engines.vllm.cartridges.placing import KEY, Standing
from kvist.engines.vllm.internals import Blocks
from kvist.engines.vllm.messages import StepReport
from kvist.layout import Layout

log = logging.getLogger("kvist.vllm")

_Key = tuple[int, bytes]
"""Group and block hash of a full block."""


@dataclass(slots=True)
class _Use:
    """A request, vLLM's, and its cartridge; ``loaded``: tokens that were loaded for it."""

    request: Any
    standing: Standing
    loaded: int = 0


class CartridgeScheduler:
    """See the module.

    Attributes:
        layouts: rank 0's, by group.
        windows: by group: the tokens that one looks back on, itself included, or ``None``: all.
    """

    def __init__(self, layouts: Sequence[Layout]) -> None:
        self.layouts = list(layouts)
        self.windows = [window_of(layout) for layout in layouts]
        self._size = layouts[0].page_size_tokens
        self._blocks: Blocks | None = None
        self._uses: dict[str, _Use] = {}  # from a request's arrival to its end, or to a failed load
        self._loading: dict[str, set[_Key]] = {}  # full blocks, by the request whose load fills them
        self._plan = InjectPlan()
        self._is_warned = False

    def bind_pool(self, pool: Any) -> None:
        """The block pool, once it exists.

        Raises:
            UnsupportedModel: blocks are hashed in other sizes than they are kept.
        """
        self._blocks = Blocks(pool, self._size)

    def bind(self, manager: Any) -> None:
        """Nothing is asked of the cache manager."""

    @property
    def in_use(self) -> int:
        """Requests that use a cartridge."""
        return len(self._uses)

    def arrive(self, request: Any) -> None:
        """A request has come: see whether it begins with a cartridge."""
        standing = Standing.of(request)
        if standing is not None:
            # It would be computed from ids that stand for the cartridge. The front end refuses who asks for that.
            request.skip_reading_prefix_cache = False
            self._uses[request.request_id] = _Use(request, standing)
        elif not self._is_warned and self._is_overlooked(request.kv_transfer_params or {}):
            self._is_warned = True
            log.error(
                "request %s names a cartridge, and kvist's plugin did not see it: none is injected; VLLM_PLUGINS must "
                "include kvist, or not be set",
                request.request_id,
            )

    @staticmethod
    def _is_overlooked(params: Mapping[str, Any]) -> bool:
        """Whether a cartridge is named, and nothing says that the front end decided for none."""
        return "cartridge_id" in params and KEY not in params

    def matched(self, request: Any, local: int) -> tuple[int | None, bool]:
        """Tokens to load beyond the ``local`` ones that the prefix cache has; ``None``: ask again after the next step.

        One token is left to compute. A request waits while another one loads a full block that it needs too, and finds
        it in the prefix cache then.
        """
        use = self._uses.get(request.request_id)
        tokens = 0 if use is None else min(use.standing.prefix.tokens, request.num_tokens - 1)
        if tokens <= local:
            return 0, False
        if self._loading and self._blocks is not None and self._blocks.caching:
            wanted = self._full_blocks(request, tokens, local)
            if any(wanted & loading for loading in self._loading.values()):
                return None, False
        return tokens - local, True

    def _full_blocks(self, request: Any, tokens: int, local: int) -> set[_Key]:
        full, hashes = tokens // self._size, request.block_hashes
        blocks = blocks_of(tokens, local, self.windows, self._size)
        return {(group, hashes[number]) for group, number in blocks if number < full}

    def allocated(self, request: Any, block_ids: Sequence[Sequence[int]], external: int) -> None:
        """vLLM has found room for the tokens that `matched` promised."""
        use = self._uses.get(request.request_id)
        if not external or use is None or self._blocks is None:
            return
        tokens = min(use.standing.prefix.tokens, request.num_tokens - 1)
        pages: list[tuple[Place, int | str]] = []
        for group, number in blocks_of(tokens, tokens - external, self.windows, self._size):
            block = block_ids[group][number]
            if block:  # 0: out of the window
                fill = min(self._size, tokens - number * self._size)
                pages.append((Place(group, block, self._blocks.generation[block], fill), number))
        use.loaded += external
        self._loading[request.request_id] = self._full_blocks(request, tokens, tokens - external)
        self._plan.loads.append(Load(request.request_id, use.standing.prefix.identity, pages))
        self._plan.directories[use.standing.prefix.identity] = use.standing.directory

    def plan(self, output: Any) -> InjectPlan:
        """What to tell the workers with this step."""
        plan, self._plan = self._plan, InjectPlan()
        return plan

    def stepped(self, finished: Iterable[str], report: Any) -> None:
        """What the workers answered. Whether a request whose load failed ends, or is computed, vLLM decides.

        What is computed goes under a salt apart: blocks of the cartridge's own hold what the cartridge holds.
        """
        for request_id in finished:
            self._loading.pop(request_id, None)
        for request_id in report.failed if isinstance(report, StepReport) else ():
            self._loading.pop(request_id, None)
            use = self._uses.pop(request_id, None)
            if use is not None:
                salt = f"{use.request.cache_salt}:computed"
                internals.resalt(use.request, internals.salt_of_failed(use.request, salt))

    def finished(self, request: Any, block_ids: Sequence[Sequence[int]]) -> dict[str, Any] | None:
        """A request has ended; returns what its answer says of its cartridge."""
        use = self._uses.pop(request.request_id, None)
        cartridge = requests.cartridge(request)
        if use is None or cartridge is None:
            return None
        return {"cartridge": cartridge | {"loaded_tokens": use.loaded}}

    def forget(self) -> None:
        """vLLM clears its caches, perhaps for other weights, which it does not tell: cartridges stay what they are."""
        log.warning(
            "vLLM's caches were cleared; cartridges were not: if the weights are others now, restart, or the keys and "
            "values of the former ones are injected"
        )

    def close(self) -> None:
        """Nothing is open."""
