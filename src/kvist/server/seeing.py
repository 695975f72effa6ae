"""What one server process shows of itself: its metrics, its page's settings, and the recorders behind both.

Puts `kvist.server.metrics`, `kvist.server.tiers` and the page together with an engine. Must not know routes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from kvist.server.access import Access, Guard
from kvist.server.gauges import watch_engine, watch_repository
from kvist.server.metrics import Metered, Metrics
from kvist.server.recent import Recent
from kvist.server.tenants import TenantApps
from kvist.server.tiers import Flow, Tier, pool_tier, residency_tier
from kvist.server.ui import EngineSide, Page
from kvist.telemetry import recording

if TYPE_CHECKING:
    from kvist.engines.hf import Engine
    from kvist.repo import Repository
    from kvist.server.sessions import Sessions


@dataclass(frozen=True, slots=True)
class Seeing:
    """One a process, however many applications it has.

    Attributes:
        metrics: of all.
        flow: to and from the store; ``None``: what is shown is a tenant's, and nothing of the others.
        may_write: whether the page offers forms.
    """

    metrics: Metrics = field(default_factory=Metrics)
    flow: Flow | None = field(default_factory=Flow)
    may_write: bool = False

    def of_tenant(self) -> Seeing:
        """The same, for the application of a tenant."""
        return replace(self, flow=None)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Count what happens in this process meanwhile."""
        with ExitStack() as stack:
            stack.enter_context(recording(self.metrics))
            if self.flow is not None:
                stack.enter_context(recording(self.flow))
            yield

    def metered(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> Metered:
        """``app``, with its requests counted; ``routes`` are those of the application in it."""
        return Metered(app, self.metrics, routes)

    def guarded(self, default: Starlette, make: Callable[[str], ASGIApp], access: Access) -> Metered:
        """All that a process serves: one application, and one for each tenant, behind one guard, counted.

        Args:
            default, make: see `kvist.server.tenants.TenantApps`.
            access: who may call.
        """
        return self.metered(Guard(TenantApps(default, make), access), default.routes)

    def page(self, sessions: Sessions, name: str) -> Page:
        """The page of one application, with its engine.

        Args:
            sessions: its engine and repository.
            name: of its model.
        """
        engine = sessions.engine

        def tiers() -> Iterator[Tier]:
            pool = pool_tier(engine)
            if self.flow is None:
                yield replace(pool, facts=())
                return
            yield pool
            residency = engine.cartridges.metrics()
            if residency.loads or residency.resident:
                yield residency_tier(residency)

        def check_out(rev: str) -> tuple[int, float]:
            done = sessions.checkout(rev)
            return done.tokens, done.restored.total_s if done.restored is not None else 0.0

        side = EngineSide(
            name=name,
            recent=Recent(engine.layout.page_size_tokens, tell=self.metrics.answered),
            pool_blocks=len(engine.pool),
            block_bytes=2 * engine.layout.page_bytes,
            tiers=tiers,
            check_out=check_out,
        )
        return Page(sessions.repo, flow=self.flow, engine=side, may_write=self.may_write)

    def watch(self, page: Page, repo: Repository, engine: Engine | None = None) -> None:
        """Have the metrics show a repository, as ``page`` counts it, and an engine."""
        watch_repository(self.metrics, repo, page.space)
        if engine is not None:
            watch_engine(self.metrics, engine)
