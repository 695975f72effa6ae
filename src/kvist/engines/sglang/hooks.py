"""Where kvist comes into SGLang: every function of SGLang's that its plugin hooks, and what happens there.

Knows SGLang's functions by their paths (0.5.23), and `HookRegistry`. What is done is done elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from kvist.engines.sglang import messages, penalties, requests
from kvist.errors import EngineError

if TYPE_CHECKING:
    from kvist.engines.sglang.scheduler import SchedulerSide

log = logging.getLogger("kvist.sglang")

_SCHEDULER: Final = "sglang.srt.managers.scheduler.Scheduler"
_TREE: Final = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
_BATCH: Final = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo"
_WEIGHTS: Final = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_ASKED: Final = "sglang.srt.managers.io_struct.GenerateReqInput"
_SERVER: Final = "sglang.srt.entrypoints.http_server._setup_and_run_http_server"

Join = Callable[[Any], "SchedulerSide"]
"""Makes what is beside a scheduler, once that is made."""
Serve = Callable[[Any, Any], None]
"""Takes the API process's application and tokenizer manager, before it listens."""

_targets: list[str] = []
_joined: list[SchedulerSide] = []
"""In a scheduler's process, the one that is beside it."""


def enter_scheduler(join: Join) -> None:
    """Be beside the scheduler, where there is one."""

    def made(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        if missing := [target for target in _targets if target not in HookRegistry._patched]:
            raise EngineError(f"SGLang has no {missing[0]} for kvist's plugin to hook: this is another version")
        side = join(scheduler)
        scheduler.kvist = scheduler.tree_cache.kvist = side
        _joined.append(side)
        messages.answer_calls(scheduler, side.answer)

    _hook(f"{_SCHEDULER}.__init__", made, HookType.AFTER)
    _hook(f"{_SCHEDULER}._add_request_to_queue", _added, HookType.AROUND)
    _hook(f"{_SCHEDULER}.ingest_requests", _between, HookType.AFTER)
    _hook(f"{_SCHEDULER}.abort_request", _aborted, HookType.BEFORE)
    _hook(f"{_SCHEDULER}.is_fully_idle", _idle, HookType.AROUND)
    _hook(f"{_TREE}.match_prefix", _matched, HookType.AROUND)
    _hook(f"{_TREE}.prefix_device_indices", _indices, HookType.AROUND)
    _hook(f"{_TREE}.on_release", _released, HookType.BEFORE)
    _hook(f"{_TREE}.reset", _emptied, HookType.AFTER)
    _hook(f"{_BATCH}.from_schedule_batch", _batched, HookType.AFTER)
    for way in ("disk", "distributed", "tensor", "ipc"):
        _hook(f"{_WEIGHTS}.update_weights_from_{way}", _reweighed, HookType.AFTER)


def enter_server(serve: Serve) -> None:
    """Be in the API process's application, where there is one."""

    def run(original: Callable[..., Any], server_args: Any, tokenizer_manager: Any, *args: Any, **kwargs: Any) -> Any:
        from sglang.srt.entrypoints import http_server

        serve(http_server.app, tokenizer_manager)
        return original(server_args, tokenizer_manager, *args, **kwargs)

    _hook(_SERVER, run, HookType.AROUND)
    _hook(f"{_ASKED}.regenerate_rid", _sampled, HookType.AROUND)


def _sampled(original: Callable[..., Any], asked: Any) -> Any:
    """Each sample of a request is called as the request is, and not just anything."""
    if isinstance(asked.rid, str):
        asked.rid = requests.choice(asked.rid)
        return asked.rid
    return original(asked)


def _hook(target: str, hook: Callable[..., Any], kind: HookType) -> None:
    _targets.append(target)
    HookRegistry.register(target, hook, kind)


def _side(owner: Any) -> SchedulerSide | None:
    return getattr(owner, "kvist", None)


# -- the scheduler -------------------------------------------------------------------------------------------------


def _added(original: Callable[..., Any], scheduler: Any, request: Any, is_retracted: bool = False) -> Any:
    side = _side(scheduler)
    if side is not None and not is_retracted:
        try:
            if side.arriving.hold(request, lambda: original(scheduler, request)):
                return None
        except Exception:  # a request that could not be looked at is computed
            log.exception("request %s: it cannot be matched to snapshots", request.rid)
    return original(scheduler, request, is_retracted)


def _between(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    side = _side(scheduler)
    if side is not None and side.arriving.is_busy:
        side.arriving.advance()


def _aborted(scheduler: Any, call: Any) -> None:
    side = _side(scheduler)
    if side is not None and side.arriving.is_busy:
        side.arriving.let_go(lambda rid: call.abort_all or rid.startswith(call.rid))


def _idle(original: Callable[..., Any], scheduler: Any, for_health_check: bool = False, **kwargs: Any) -> bool:
    is_idle = bool(original(scheduler, for_health_check, **kwargs))
    side = _side(scheduler)
    return is_idle and (for_health_check or side is None or not side.arriving.is_busy)


def _reweighed(result: Any, *args: Any, **kwargs: Any) -> None:
    for side in _joined:
        side.spoil("the weights were replaced while SGLang ran")


# -- its prefix cache ----------------------------------------------------------------------------------------------


def _matched(original: Callable[..., Any], tree: Any, params: Any) -> Any:
    found = original(tree, params)
    side = _side(tree)
    if side is None or params.req is None or not side.arriving.is_busy:
        return found
    return side.arriving.matched(params.req, len(params.key), found)


def _indices(original: Callable[..., Any], tree: Any, request: Any) -> Any:
    side = _side(tree)
    own = side.arriving.indices(request) if side is not None and side.arriving.is_busy else None
    return original(tree, request) if own is None else own


def _released(tree: Any, request: Any, **kwargs: Any) -> None:
    side = _side(tree)
    if side is not None:
        try:
            side.ended(request)
        except Exception:  # SGLang must go on
            log.exception("request %s: it cannot be kept for snapshots", request.rid)


def _emptied(result: Any, tree: Any) -> None:
    side = _side(tree)
    if side is not None:
        side.forget()


# -- its batches ---------------------------------------------------------------------------------------------------


def _batched(info: Any, cls: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    standings = [requests.standing(request) for request in batch.reqs]
    if any(standing is not None and standing.before for standing in standings):
        outputs = [standing.before if standing is not None else [] for standing in standings]
        penalties.count_before(info.penalizer_orchestrator, outputs)
