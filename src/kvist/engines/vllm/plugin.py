"""vLLM's general plugin: answers the API process's calls in the engine core. Imports vLLM only when it is loaded."""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvist.engines.paged import answers
from kvist.errors import EngineError, KvistError

if TYPE_CHECKING:
    from kvist.cartridge.model import ModelIdentity
    from kvist.engines.paged.plans import CapturePlan
    from kvist.engines.vllm.cartridges.frontend import Frontend
    from kvist.engines.vllm.cartridges.placing import Served, Standing
    from kvist.engines.vllm.scheduler import SchedulerSide

log = logging.getLogger("kvist.vllm")

CALL = "kvist"
"""``collective_rpc(CALL, args=(op, payload))``."""


def register() -> None:
    """Entry point ``vllm.general_plugins: kvist``. Loaded in every process of vLLM; idempotent."""
    from kvist.engines.vllm import arriving, intake, internals, sides

    internals.enter_core(CALL, _answer, _prepare)
    sides.register_connectors()
    intake.enter_frontend(_open_frontend)
    arriving.enter_placing(_place)


def _open_frontend(extra: Mapping[str, Any], model: ModelIdentity, served: Served) -> Frontend:
    from kvist.engines.vllm.cartridges.frontend import Frontend

    return Frontend.open(extra, model, served)


def _place(core: Any, request: Any, marker: object) -> tuple[Standing, list[int]] | None:
    """In the engine core, where a request arrives; see `Prefixes.of`."""
    from kvist.engines.vllm.intake import cartridge_settings

    if cartridge_settings(core.vllm_config) is None:
        log.warning("request %s: it names a cartridge as a client may not; ignored", request.request_id)
        return None
    from kvist.engines.vllm.cartridges.connector import CartridgeConnector
    from kvist.engines.vllm.internals import find_connector

    connector = find_connector(core.scheduler.connector, CartridgeConnector)
    found: tuple[Standing, list[int]] = connector.prefixes.of(marker, request.prompt_token_ids, request.cache_salt)
    return found


def _prepare(core: Any) -> None:
    """Make the sides known to what holds the tables: vLLM does not tell a connector of all of it."""
    try:
        _Core(core).ranks("describe")
    except EngineError as error:  # no connector: nothing to prepare
        log.debug("%s", error)
    except Exception:  # a request must not fail for it
        log.exception("kvist is not ready")


def _answer(core: Any, op: str, payload: Mapping[str, Any]) -> dict[str, Any]:
    """In the engine core, between two steps."""

    def work() -> dict[str, Any]:
        return _cartridge_stats(core) if op == "cartridge_stats" else answers.call(_Core(core), op, payload)

    return answers.answer(op, work)


class _Core:
    """One engine core: its connector, and the workers. An `answers.Engine`."""

    def __init__(self, core: Any) -> None:
        from kvist.engines.vllm.connector import KvistConnector
        from kvist.engines.vllm.internals import find_connector

        found = find_connector(core.scheduler.connector, KvistConnector)
        if found is None or found.scheduler is None:
            raise EngineError(
                "this server has no KvistConnector",
                hint='--kv-transfer-config \'{"kv_connector": "KvistConnector", "kv_connector_module_path": '
                '"kvist.engines.vllm.connector", "kv_role": "kv_both", "kv_connector_extra_config": '
                '{"store": "file:///srv/kv"}}\'',
            )
        self.decider: SchedulerSide = found.scheduler
        self.decider.bind(core.scheduler.kv_cache_manager)
        self._config, self._executor = core.vllm_config, core.model_executor

    def must_pause(self, wanted: str | None) -> bool:
        """Where the sampler runs ahead of what the scheduler knows, a generator is at no token that is known."""
        return bool(self._config.scheduler_config.async_scheduling) and self.decider.draws(wanted)

    def begin(self, plan: CapturePlan) -> None:
        """See `answers.Engine`."""
        self._workers("begin", plan)

    def ranks(self, method: str, *args: Any) -> list[Any]:
        """See `answers.Engine`."""
        return self._workers(f"mover.{method}", *args)

    def _workers(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every rank's `WorkerSide`, or of its parts; the first error of any rank is raised."""
        found = self._executor.collective_rpc(_in_worker, args=(method, args))
        for each in found:
            if isinstance(each, _Raised):
                raise each.error
        return list(found)


@dataclass(frozen=True)
class _Raised:
    """An error as a worker's result: of an exception, vLLM's executor of processes keeps only the text (0.32)."""

    error: KvistError


def _in_worker(worker: Any, method: str, args: tuple[Any, ...]) -> Any:
    """Runs in a worker's thread, between two steps."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from kvist.engines.vllm.connector import KvistConnector
    from kvist.engines.vllm.internals import find_connector

    connector = find_connector(get_kv_transfer_group(), KvistConnector)
    connector.worker.attach(worker.model_runner)
    try:
        return operator.attrgetter(method)(connector.worker)(*args)
    except KvistError as error:
        return _Raised(error)


def _cartridge_stats(core: Any) -> dict[str, Any]:
    """Of the other connector, which may be there alone."""
    found = core.model_executor.collective_rpc(_cartridge_stats_of)
    if None in found:
        raise EngineError("this server has no CartridgeConnector", hint="see docs/guides/cartridges.md")
    return {"ranks": list(found)}


def _cartridge_stats_of(worker: Any) -> dict[str, Any] | None:
    """Runs in a worker's thread, between two steps."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    from kvist.engines.vllm.cartridges.connector import CartridgeConnector
    from kvist.engines.vllm.internals import find_connector

    found = find_connector(get_kv_transfer_group(), CartridgeConnector) if has_kv_transfer_group() else None
    return None if found is None else dict(found.worker.stats())
