"""vLLM's general plugin: answers the API process's calls in the engine core. Imports vLLM only when it is loaded."""

from __future__ import annotations

import base64
import hashlib
import logging
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from kvist.engines.vllm.matching import Stored, first_block
from kvist.errors import EngineError, InvalidInput, InvalidManifest, KvistError

if TYPE_CHECKING:
    from kvist.cartridge.model import ModelIdentity
    from kvist.engines.vllm.cartridges.frontend import Frontend
    from kvist.engines.vllm.cartridges.placing import Served, Standing
    from kvist.engines.vllm.connector import KvistConnector

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
        _Core(core).workers("describe")
    except EngineError as error:  # no connector: nothing to prepare
        log.debug("%s", error)
    except Exception:  # a request must not fail for it
        log.exception("kvist is not ready")


def _answer(core: Any, op: str, payload: Mapping[str, Any]) -> dict[str, Any]:
    """In the engine core, between two steps. Errors come back as values: vLLM would keep only their text.

    An answer is encoded here once before vLLM does: one that it could not encode would end its output thread.
    """
    try:
        if op == "cartridge_stats":
            answer = _cartridge_stats(core)
        elif op in _OPS:
            answer = _OPS[op](_Core(core), payload)
        else:
            raise InvalidInput(f"unknown call {op!r:.80}")
        msgspec.msgpack.encode(answer)
        return answer
    except KvistError as error:
        return _error(error)
    except Exception as error:
        log.exception("kvist call %s failed", op)
        return _error(EngineError(f"{type(error).__name__}: {error}"))


def _error(error: KvistError) -> dict[str, Any]:
    return {"error": {"kind": error.kind, "message": str(error), "hint": error.hint}}


class _Core:
    """One engine core: its connector, and the workers."""

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
        self.connector: KvistConnector = found
        self.scheduler = found.scheduler
        self.scheduler.bind(core.scheduler.kv_cache_manager)
        self.config = core.vllm_config
        self._executor = core.model_executor

    def workers(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every rank's `WorkerSide`, or of its parts; the first error of any rank is raised."""
        answers = self._executor.collective_rpc(_in_worker, args=(method, args))
        for answer in answers:
            if isinstance(answer, KvistError):
                raise answer
        return list(answers)


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
        return error


def _describe(core: _Core, payload: Mapping[str, Any]) -> dict[str, Any]:
    from kvist.engines.vllm import internals

    described = core.workers("describe")
    assert core.scheduler.blocks is not None
    return {
        "layouts": [layouts for layouts, _ in described],
        "numerics": described[0][1],
        "max_model_len": core.config.model_config.max_model_len,
        "prefix_caching": core.scheduler.blocks.caching,
        "async_scheduling": bool(core.config.scheduler_config.async_scheduling),
        "mode": core.connector.mode,
        "vllm": internals.release(),
    }


def _begin(core: _Core, payload: Mapping[str, Any]) -> dict[str, Any]:
    wanted = payload.get("request_id")
    ahead = bool(core.config.scheduler_config.async_scheduling)
    if ahead and not payload.get("paused") and core.scheduler.draws(wanted):
        return {"needs_pause": True}
    plan = core.scheduler.capture(wanted)
    try:
        core.workers("begin", plan)
    except BaseException:
        _release(core, {"capture": plan.id})
        raise
    return {
        "needs_pause": False,
        "capture": plan.id,
        "pages": len(plan.places),
        "sequences": [
            {"id": seq.id, "tokens": len(seq.token_ids), "cached_tokens": seq.cached} for seq in plan.sequences
        ],
    }


def _copy(core: _Core, payload: Mapping[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    capture = payload["capture"]
    gone = core.scheduler.gone(capture)
    answers = core.workers("captures.copy", capture, gone)
    return {
        "left": max(answer["left"] for answer in answers),
        "busy": any(answer["busy"] for answer in answers),
        "pause_ms": (time.perf_counter() - started) * 1000,
    }


def _finish(core: _Core, payload: Mapping[str, Any]) -> dict[str, Any]:
    answers = core.workers("captures.finish", payload["capture"])
    if not all(answer["done"] for answer in answers):
        return {"done": False}
    first = answers[0]
    return {
        "done": True,
        "manifests": [answer["manifests"] for answer in answers],
        "pages": first["pages"],
        "pages_copied": first["pages_copied"],
        "new_bytes": sum(answer["new_bytes"] for answer in answers),
    }


def _release(core: _Core, payload: Mapping[str, Any]) -> dict[str, Any]:
    core.scheduler.release(payload["capture"])
    core.workers("captures.release", payload["capture"])
    return {}


def _checkout(core: _Core, payload: Mapping[str, Any]) -> dict[str, Any]:
    content = _content(payload["manifests"])
    core.workers("open", content, payload["manifests"])
    by_hash = [
        {bytes.fromhex(name): ix for ix, name in group["pages"] if name is not None} for group in payload["groups"]
    ]
    size = core.scheduler.layouts[0].page_size_tokens
    windows = core.scheduler.windows
    sequences = [_stored(sequence, size, windows) for sequence in payload["sequences"]]
    dropped = core.scheduler.check_out(payload["cid"], content, by_hash, sequences)
    if dropped:
        core.workers("forget", dropped)
    return {"ok": True}


def _content(manifests: Sequence[Sequence[str]]) -> str:
    """One name for what the manifests of all ranks and groups hold."""
    return hashlib.sha256(" ".join(cid for rank in manifests for cid in rank).encode()).hexdigest()


def _stored(sequence: Mapping[str, Any], size: int, windows: Sequence[int | None]) -> Stored:
    """A sequence as requests may match it.

    Raises:
        InvalidManifest: its groups do not fit together, or its state is none of ours.
    """
    pages: list[list[int | None]] = []
    cached: set[int] = set()
    for group in sequence["groups"]:
        held: list[int | None] = [None] * group["first_page"] + list(group["page_ixs"])
        pages.append(held)
        cached.add((len(held) - 1) * size + (group["fill"] or size) if group["page_ixs"] else 0)
    tokens, state = next(iter(cached)), sequence["state"]
    fits = (
        len(cached) == 1
        and len(sequence["token_ids"]) >= tokens
        and all(
            group["first_page"] <= first_block(tokens, window, size)
            for group, window in zip(sequence["groups"], windows, strict=True)
        )
    )
    if tokens and not fits:
        raise InvalidManifest(f"sequence {sequence['id']!r}: its groups hold different tokens, or not its whole window")
    prompt, rng, sampling = state.get("prompt_tokens", 0), state.get("rng", ""), state.get("sampling", {})
    if type(prompt) is not int or not isinstance(rng, str) or not isinstance(sampling, dict):
        raise InvalidManifest(f"sequence {sequence['id']!r}: prompt_tokens, rng or sampling in its state are not ours")
    try:
        base64.b64decode(rng, validate=True)
    except ValueError:
        raise InvalidManifest(f"sequence {sequence['id']!r}: rng in its state is not base64") from None
    return Stored(sequence["id"], list(sequence["token_ids"]), tokens, pages, state)


def _preload(core: _Core, payload: Mapping[str, Any]) -> dict[str, Any]:
    answers = core.workers("preload", core.scheduler.content(payload["cid"]))
    return {
        "done": all(answer["done"] for answer in answers),
        "pages": answers[0]["pages"],
        "pages_loaded": min(answer["pages_loaded"] for answer in answers),
    }


def _checkouts(core: _Core, payload: Mapping[str, Any]) -> dict[str, Any]:
    return {"cids": core.scheduler.checkouts}


def _stats(core: _Core, payload: Mapping[str, Any]) -> dict[str, Any]:
    return {"ranks": core.workers("stats")}


def _cartridge_stats(core: Any) -> dict[str, Any]:
    """Of the other connector, which may be there alone."""
    answers = core.model_executor.collective_rpc(_cartridge_stats_of)
    if None in answers:
        raise EngineError("this server has no CartridgeConnector", hint="see docs/guides/cartridges.md")
    return {"ranks": list(answers)}


def _cartridge_stats_of(worker: Any) -> dict[str, Any] | None:
    """Runs in a worker's thread, between two steps."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    from kvist.engines.vllm.cartridges.connector import CartridgeConnector
    from kvist.engines.vllm.internals import find_connector

    found = find_connector(get_kv_transfer_group(), CartridgeConnector) if has_kv_transfer_group() else None
    return None if found is None else dict(found.worker.stats())


_OPS: Final[dict[str, Callable[[_Core, Mapping[str, Any]], dict[str, Any]]]] = {
    "describe": _describe,
    "begin": _begin,
    "copy": _copy,
    "finish": _finish,
    "release": _release,
    "checkout": _checkout,
    "checkouts": _checkouts,
    "preload": _preload,
    "stats": _stats,
}
