"""kvist in a process of SGLang: what its entry point does there. Imports SGLang only when it is called."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from kvist.engines.sglang.settings import Settings, from_environment

if TYPE_CHECKING:
    from kvist.engines.sglang.hooks import Serve
    from kvist.engines.sglang.scheduler import SchedulerSide

log = logging.getLogger("kvist.sglang")


def register(serve: Serve) -> None:
    """Register kvist's hooks in this process; nothing where no settings ask for it.

    Args:
        serve: see `kvist.engines.sglang.hooks.enter_server`.

    Raises:
        InvalidInput: the settings cannot be read.
    """
    settings = from_environment()
    if settings is None:
        return
    from kvist.engines.sglang import hooks, messages

    messages.register()
    hooks.enter_scheduler(lambda scheduler: _join(scheduler, settings))
    hooks.enter_server(serve)


def _join(scheduler: Any, settings: Settings) -> SchedulerSide:
    from kvist.engines.sglang.scheduler import SchedulerSide

    side = SchedulerSide(scheduler, settings)
    log.info("snapshots go to %s", settings.store)
    return side
