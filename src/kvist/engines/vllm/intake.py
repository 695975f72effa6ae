"""The way of a request into vLLM, in the API process: the hooks where its cartridge is found.

A request passes `AsyncLLM.generate`, or, from ``vllm.LLM``, `InputProcessor.process_inputs`; then, in the engine core,
`kvist.engines.vllm.arriving`. Reaches into vLLM as `kvist.engines.vllm.internals` does, on the same versions; what a
cartridge is it leaves to the front end.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vllm.v1.engine import EngineCoreRequest

from kvist.cartridge.model import DTYPES, ModelIdentity
from kvist.engines.vllm import bodies, internals
from kvist.engines.vllm.arriving import begin_of
from kvist.engines.vllm.cartridges.placing import KEY, Asked, Placed, Served, check_unmarked
from kvist.engines.vllm.refusing import refusal
from kvist.errors import KvistError, UnsupportedModel

if TYPE_CHECKING:
    from kvist.engines.vllm.cartridges.frontend import Frontend  # imports what only cartridges need

_CONNECTOR: Final = "CartridgeConnector"
_MODULE: Final = "kvist.engines.vllm.cartridges"
_DECIDED: Final = "kvist_placed"
"""Key of a rendered prompt under which `generate` leaves what it decided for `process_inputs`."""


# -- configuration -----------------------------------------------------------------------------------------------


def cartridge_settings(vllm_config: Any) -> Mapping[str, Any] | None:
    """The ``kv_connector_extra_config`` of our connector for cartridges, also as a child; ``None``: there is none."""
    transfer = getattr(vllm_config, "kv_transfer_config", None)
    if transfer is None:
        return None
    extra: Mapping[str, Any] = transfer.kv_connector_extra_config or {}
    if _is_ours(transfer.kv_connector, transfer.kv_connector_module_path):
        return extra
    for child in extra.get("connectors", ()):
        if _is_ours(child.get("kv_connector"), child.get("kv_connector_module_path")):
            return child.get("kv_connector_extra_config") or {}
    return None


def _is_ours(name: str | None, module: str | None) -> bool:
    return name == _CONNECTOR and (module or "").startswith(_MODULE)


def model_identity(vllm_config: Any, settings: Mapping[str, Any]) -> ModelIdentity:
    """What cartridges must fit: the model that vLLM serves, and the type of its KV cache.

    Args:
        vllm_config: vLLM's.
        settings: of the connector; ``model`` and ``revision`` name what cannot be known.

    Raises:
        UnsupportedModel: a KV cache that no cartridge holds, or a model of which no directory is known.
    """
    config, cached = vllm_config.model_config, vllm_config.cache_config.cache_dtype
    dtype = str(config.dtype).removeprefix("torch.") if cached == "auto" else str(cached)
    if dtype not in DTYPES:
        raise UnsupportedModel(f"expected a KV cache of {', '.join(DTYPES)} for cartridges, got {dtype}")
    directory = Path(config.model)
    is_local = directory.is_dir()
    if not is_local:
        directory = _fetched(config, vllm_config.load_config.download_dir)
    return ModelIdentity.of_directory(
        directory,
        dtype=dtype,
        model_id=settings.get("model") or (None if is_local else config.model),
        revision=settings.get("revision") or internals.pinned(vllm_config, directory),
    )


def _fetched(config: Any, cache_dir: str | None) -> Path:
    """Where vLLM has put a model that it fetched."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(config.model, revision=config.revision, cache_dir=cache_dir, local_files_only=True)
        )
    except (OSError, ValueError) as error:
        raise UnsupportedModel(
            f"expected {config.model} to be a directory, or fetched from the hub: what cartridges must fit is told by "
            f"its config.json, and there is none: {error}",
            hint="serve a directory (huggingface-cli download)",
        ) from error


# -- the API process ---------------------------------------------------------------------------------------------


class Frontends:
    """The front end of each engine of this process, opened when it is first asked for. Thread-safe."""

    def __init__(self, opening: Callable[[Mapping[str, Any], ModelIdentity, Served], Frontend]) -> None:
        self._opening = opening
        self._opened: weakref.WeakKeyDictionary[Any, Frontend | None] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def of(self, processor: Any, *, waits: bool = True) -> Frontend | None:
        """The front end of vLLM's input processor; ``None``: its engine has no cartridges.

        Args:
            processor: vLLM's.
            waits: see `Served`; counts when it is opened.
        """
        with self._lock:
            if processor not in self._opened:
                config = processor.vllm_config
                settings = cartridge_settings(config)
                if settings is None:
                    self._opened[processor] = None
                else:
                    served = _served(config, waits=waits)
                    self._opened[processor] = self._opening(settings, model_identity(config, settings), served)
            return self._opened[processor]

    def all(self) -> list[Frontend]:
        """Those that are open."""
        with self._lock:
            return [frontend for frontend in self._opened.values() if frontend is not None]


def _served(config: Any, *, waits: bool) -> Served:
    text = config.model_config.hf_text_config
    return Served(
        max_model_len=config.model_config.max_model_len,
        vocabulary=config.model_config.get_vocab_size(),
        bos_id=begin_of(config),
        ranks=config.parallel_config.tensor_parallel_size,
        keeps_all=getattr(text, "sliding_window", None) is None,
        recomputes=config.kv_transfer_config.kv_load_failure_policy == "recompute",
        waits=waits,
    )


def enter_frontend(opening: Callable[[Mapping[str, Any], ModelIdentity, Served], Frontend]) -> None:
    """Let a front end decide on every request of this process. Idempotent.

    `AsyncLLM.generate` becomes a plain function: the servers call it before they begin to answer, so what it raises
    has a status of its own, for streams too.
    """
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    start, generate, process = AsyncLLM.__init__, AsyncLLM.generate, InputProcessor.process_inputs
    if hasattr(process, "frontends"):
        return
    frontends = Frontends(opening)

    @functools.wraps(start)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        try:
            frontend = frontends.of(self.input_processor, waits=False)
        except BaseException:
            self.shutdown()
            raise
        if frontend is not None:
            bodies.watch(frontends.all)

    @functools.wraps(generate)
    def decide(self: Any, prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any) -> Any:
        frontend = frontends.of(self.input_processor)
        if frontend is None:
            _refuse_marker(sampling_params)
        else:
            prompt = _decided(frontend, prompt, sampling_params)
        return generate(self, prompt, sampling_params, request_id, *args, **kwargs)

    @functools.wraps(process)
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        request = process(self, request_id, prompt, params, *args, **kwargs)
        frontend = frontends.of(self)
        if frontend is None:
            _refuse_marker(request.sampling_params)
        elif request.sampling_params is not None:
            if isinstance(prompt, dict) and _DECIDED in prompt:
                placed = prompt[_DECIDED]
            else:
                placed = _place(frontend, _asked_of(request, prompt))
            _mark(request, placed)
        return request

    process_inputs.frontends = frontends  # type: ignore[attr-defined]
    AsyncLLM.__init__ = init
    AsyncLLM.generate = decide
    InputProcessor.process_inputs = process_inputs


def _decided(frontend: Frontend, prompt: Any, params: Any) -> Any:
    """The prompt with what was decided on it; one that is not rendered yet is left to `process_inputs`."""
    if isinstance(prompt, EngineCoreRequest):
        _mark(prompt, _place(frontend, _asked_of(prompt)))
        return prompt
    if isinstance(prompt, AsyncGenerator):
        _place(frontend, _asked(None, params, None, "a prompt that is streamed in"))
        return prompt
    if not (isinstance(prompt, dict) and "type" in prompt):
        return prompt
    kind = prompt["type"]
    strange = None if kind == "token" else f"a prompt of type {kind}"
    ids, is_text = prompt.get("prompt_token_ids"), prompt.get("prompt") is not None
    placed = _place(frontend, _asked(ids, params, prompt.get("cache_salt"), strange, is_text=is_text))
    return {**prompt, _DECIDED: placed}


def _asked(
    ids: Sequence[int] | None, params: Any, salt: str | None, strange: str | None, *, is_text: bool = False
) -> Asked:
    return Asked(
        prompt_ids=ids,
        extra_args=params.extra_args,
        salt=salt,
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        needs_prompt=params.prompt_logprobs is not None or bool(params.skip_reading_prefix_cache),
        strange=strange,
        is_text=is_text,
    )


def _asked_of(request: Any, prompt: Any = None) -> Asked:
    kinds = {
        "prompt embeddings": request.prompt_embeds is not None,
        "a multimodal prompt": bool(request.mm_features),
        "a prompt that is streamed in": request.resumable,
        "LoRA": request.lora_request is not None,
    }
    strange = next((name for name, is_so in kinds.items() if is_so), None)
    is_text = isinstance(prompt, str) or (isinstance(prompt, dict) and prompt.get("prompt") is not None)
    return _asked(request.prompt_token_ids, request.sampling_params, request.cache_salt, strange, is_text=is_text)


def _refuse_marker(params: Any) -> None:
    """Where there are no cartridges, nobody else looks at what a client says of them."""
    extra = getattr(params, "extra_args", None)
    if isinstance(transfer := (extra or {}).get("kv_transfer_params"), Mapping):
        try:
            check_unmarked(transfer)
        except KvistError as error:
            raise refusal(error) from error


def _place(frontend: Frontend, asked: Asked) -> Placed | None:
    try:
        return frontend.place(asked)
    except KvistError as error:
        raise refusal(error) from error


def _mark(request: Any, placed: Placed | None) -> None:
    """Tell the engine core; the request's sampling parameters are its own by now."""
    params = request.sampling_params
    if placed is not None:
        request.cache_salt = placed.salt
        params.max_tokens = placed.max_tokens
        params.extra_args = placed.mark(params.extra_args)
    elif "cartridge_id" in (transfer := (params.extra_args or {}).get("kv_transfer_params") or {}):
        params.extra_args = {**params.extra_args, "kv_transfer_params": {**transfer, KEY: None}}  # seen, and none used
