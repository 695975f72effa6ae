"""The connector in a worker: its pages, and the sampler of its model runner.

Knows vLLM's caches and generators; what happens to pages is `kvist.engines.paged.mover`'s.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import torch

from kvist.engines.paged.mover import PageMover
from kvist.engines.paged.plans import CapturePlan, SequencePlan
from kvist.engines.vllm import internals
from kvist.engines.vllm.messages import Start, StepPlan, StepReport
from kvist.engines.vllm.pages import pages_of
from kvist.layout import Layout

log = logging.getLogger("kvist.vllm")

_GENERATORS_MAX: Final = 1024


class WorkerSide:
    """See the module.

    Attributes:
        mover: moves this rank's pages.
    """

    def __init__(
        self,
        layouts: list[Layout],
        store: str,
        host_bytes: int,
        numerics: Callable[[], dict[str, Any]],
        cache_bytes: int | None,
        tiers: Sequence[str] = (),
    ) -> None:
        """See `PageMover`."""
        self.mover = PageMover(layouts, store, host_bytes, numerics, cache_bytes, tiers)
        self._runner: Any = None
        self._generators: dict[str, torch.Generator] = {}

    def register(self, caches: dict[str, torch.Tensor], groups: Sequence[Sequence[str]], blocks: int) -> None:
        """The cache of each layer, once vLLM has made them."""
        self.mover.register(
            [
                pages_of(layout, [caches[name] for name in names], blocks)
                for layout, names in zip(self.mover.layouts, groups, strict=True)
            ]
        )

    def attach(self, runner: Any) -> None:
        """The model runner, which holds the generators."""
        self._runner = runner

    def stats(self) -> dict[str, int | float]:
        """What this worker has done since it started; see `kvist.engines.vllm.metrics.SNAPSHOTS`."""
        return self.mover.stats()

    def begin(self, plan: CapturePlan) -> None:
        """Begin a capture, with the generators as they stand; see `Captures.begin`."""
        self.mover.captures.begin(replace(plan, sequences=[self._drawing(sequence) for sequence in plan.sequences]))

    def _drawing(self, sequence: SequencePlan) -> SequencePlan:
        generator = self._generators.get(sequence.request_id)
        if generator is None:
            return sequence
        rng = base64.b64encode(generator.get_state().numpy().tobytes()).decode()
        return replace(sequence, state={**sequence.state, "rng": rng})

    # -- in every step -------------------------------------------------------------------------------------------

    def before_step(self, plan: StepPlan) -> None:
        """After requests entered the batch, before anything is computed."""
        for request_id in plan.seeded:
            generator = internals.generator_of(self._runner, request_id)
            if generator is not None:
                self._generators[request_id] = generator
                while len(self._generators) > _GENERATORS_MAX:
                    del self._generators[next(iter(self._generators))]
        for start in plan.starts:
            self._go_on(start)
        self.mover.save(plan.saves, plan.uses)

    def _go_on(self, start: Start) -> None:
        generator = internals.generator_of(self._runner, start.request_id)
        if start.generator is not None and generator is not None:
            try:
                generator.set_state(torch.tensor(list(start.generator), dtype=torch.uint8))
            except RuntimeError as error:
                log.warning(
                    "request %s: its draws start anew, the state is no generator's: %s", start.request_id, error
                )
        if start.prompt_tokens is not None and internals.carries_output(self._runner):
            internals.tell_output(self._runner, start.request_id, start.prompt_tokens)

    def start_loads(self, plan: StepPlan) -> None:
        """Begin to bring in what requests wait for."""
        self.mover.load(plan.loads)

    def take_arrived(self) -> tuple[set[str], set[str], set[int]]:
        """See `Arrivals.take`."""
        return self.mover.arrivals.take()

    def take_report(self) -> StepReport | None:
        """See `Arrivals.take_report`."""
        return StepReport.of(self.mover.arrivals.take_report())

    def close(self) -> None:
        """Stop the threads."""
        self.mover.close()
