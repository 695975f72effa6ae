"""The way of a request into vLLM, where cartridges are found and placed: two hooks, in two processes.

In the API process every request passes `AsyncLLM.generate`, or, from ``vllm.LLM``, `InputProcessor.process_inputs`. In
the engine core it passes `EngineCore.preprocess_add_request`, before its blocks are hashed. Reaches into vLLM as
`kvist.engines.vllm.internals` does, on the same versions; what a cartridge is it leaves to the front end.
"""

from __future__ import annotations

import copy
import functools
import sys
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from vllm.exceptions import VLLMNotFoundError, VLLMServerError, VLLMValidationError
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.metrics.stats import PrefillStats

from kvist.cartridge.model import DTYPES, ModelIdentity
from kvist.engines.vllm import internals
from kvist.engines.vllm.cartridges.placing import Asked, Placed
from kvist.errors import InvalidInput, KvistError, LayoutMismatch, NotFound, UnsupportedModel

if TYPE_CHECKING:
    from kvist.engines.vllm.cartridges.frontend import Frontend  # imports what only cartridges need

CONNECTOR: Final = "CartridgeConnector"
_MODULE: Final = "kvist.engines.vllm.cartridges"
_DECIDED: Final = "kvist_placed"
"""Key of a rendered prompt under which `generate` leaves what it decided for `process_inputs`."""
_BODIES: Final = (
    ("vllm.entrypoints.openai.completion.protocol", "CompletionRequest"),
    ("vllm.entrypoints.openai.chat_completion.protocol", "ChatCompletionRequest"),
    ("vllm.entrypoints.openai.responses.protocol", "ResponsesRequest"),
)
"""Bodies of requests, by their modules."""


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
    return name == CONNECTOR and (module or "").startswith(_MODULE)


def model_identity(vllm_config: Any, settings: Mapping[str, Any]) -> ModelIdentity:
    """What cartridges must fit: the model that vLLM serves, and the type of its KV cache.

    Args:
        vllm_config: vLLM's.
        settings: of the connector; ``model`` and ``revision`` name what cannot be known.

    Raises:
        UnsupportedModel: a KV cache that no cartridge holds.
    """
    config, cached = vllm_config.model_config, vllm_config.cache_config.cache_dtype
    dtype = str(config.dtype).removeprefix("torch.") if cached == "auto" else str(cached)
    if dtype not in DTYPES:
        raise UnsupportedModel(f"expected a KV cache of {', '.join(DTYPES)} for cartridges, got {dtype}")
    directory = Path(config.model)
    is_local = directory.is_dir()
    if not is_local:
        from huggingface_hub import snapshot_download

        directory = Path(snapshot_download(config.model, revision=config.revision, local_files_only=True))
    return ModelIdentity.of_directory(
        directory,
        dtype=dtype,
        model_id=settings.get("model") or (None if is_local else config.model),
        revision=settings.get("revision") or internals.pinned(vllm_config, directory),
    )


def register_connector() -> None:
    """Let vLLM find the connector by its name alone, as `MultiConnector` does for its children's metrics. Idempotent.

    A connector of that name that vLLM has itself stays what it is: ours is loaded by its module's path all the same.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, _MODULE, CONNECTOR)


# -- the API process ---------------------------------------------------------------------------------------------


class Opening(Protocol):
    """How to make a front end."""

    def __call__(
        self,
        extra: Mapping[str, Any],
        model: ModelIdentity,
        max_model_len: int,
        *,
        recomputes: bool,
        bos_id: int | None,
    ) -> Frontend:
        """See `Frontend.open`."""


class Frontends:
    """The front end of each engine of this process, opened when it is first asked for. Thread-safe."""

    def __init__(self, opening: Opening) -> None:
        self._opening = opening
        self._opened: weakref.WeakKeyDictionary[Any, Frontend | None] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def of(self, processor: Any) -> Frontend | None:
        """The front end of vLLM's input processor; ``None``: its engine has no cartridges."""
        with self._lock:
            if processor not in self._opened:
                config = processor.vllm_config
                settings = cartridge_settings(config)
                self._opened[processor] = settings if settings is None else self._open(settings, config)
            return self._opened[processor]

    def all(self) -> list[Frontend]:
        """Those that are open."""
        with self._lock:
            return [frontend for frontend in self._opened.values() if frontend is not None]

    def _open(self, settings: Mapping[str, Any], config: Any) -> Frontend:
        policy = config.kv_transfer_config.kv_load_failure_policy
        return self._opening(
            settings,
            model_identity(config, settings),
            config.model_config.max_model_len,
            recomputes=policy == "recompute",
            bos_id=_begin(config),
        )


def enter_frontend(opening: Opening) -> None:
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
            frontend = frontends.of(self.input_processor)
        except BaseException:
            self.shutdown()
            raise
        if frontend is not None:
            _watch_bodies(frontends)

    @functools.wraps(generate)
    def decide(self: Any, prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any) -> Any:
        frontend = frontends.of(self.input_processor)
        if frontend is not None:
            prompt = _decided(frontend, prompt, sampling_params)
        return generate(self, prompt, sampling_params, request_id, *args, **kwargs)

    @functools.wraps(process)
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        request = process(self, request_id, prompt, params, *args, **kwargs)
        frontend = frontends.of(self)
        if frontend is not None and request.sampling_params is not None:
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


def frontend_of(engine: Any) -> Frontend | None:
    """The front end of an engine client (`AsyncLLM`); ``None``: it has no cartridges, or no hooks."""
    process = type(engine.input_processor).process_inputs
    found: Frontend | None = process.frontends.of(engine.input_processor) if hasattr(process, "frontends") else None
    return found


def frontends_here() -> list[Frontend]:
    """The front ends that are open in this process."""
    from vllm.v1.engine.input_processor import InputProcessor

    frontends = getattr(InputProcessor.process_inputs, "frontends", None)
    return [] if frontends is None else frontends.all()


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


def _place(frontend: Frontend, asked: Asked) -> Placed | None:
    try:
        return frontend.place(asked)
    except KvistError as error:
        raise refusal(error) from error


def _mark(request: Any, placed: Placed | None) -> None:
    """Tell the engine core; the request's sampling parameters are its own by now."""
    if placed is not None:
        request.cache_salt = placed.salt
        request.sampling_params.max_tokens = placed.max_tokens
        request.sampling_params.extra_args = placed.mark(request.sampling_params.extra_args)


def refusal(error: KvistError) -> Exception:
    """``error`` as vLLM's servers tell it: 404, 400, or 500."""
    message = f"{error} ({error.hint})" if error.hint else str(error)
    kind: type[Exception] = VLLMServerError
    if isinstance(error, NotFound):
        kind = VLLMNotFoundError
    elif isinstance(error, InvalidInput | LayoutMismatch):
        kind = VLLMValidationError
    return kind(message)


def _watch_bodies(frontends: Frontends) -> None:
    """Look at bodies where what they say would get lost on its way to `generate`, or come there too late.

    Beam search makes requests of its own, which name no cartridge; `/v1/responses` asks the engine when its answer has
    begun; and what raw HTTP nests in ``extra_body``, as only OpenAI's client may, vLLM drops. Only in an API server are
    these modules there, and only there are they needed.
    """
    for module, name in _BODIES:
        body = getattr(sys.modules.get(module), name, None)
        if body is None or hasattr(body.to_sampling_params, "watched"):
            continue
        body.to_sampling_params = _watched(body.to_sampling_params, frontends)
        if hasattr(body, "to_beam_search_params"):
            body.to_beam_search_params = _without_cartridge(body.to_beam_search_params, frontends)


def _watched(convert: Callable[..., Any], frontends: Frontends) -> Callable[..., Any]:
    @functools.wraps(convert)
    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        _unnest(self)
        params = convert(self, *args, **kwargs)
        for frontend in frontends.all():
            _find(frontend, params.extra_args)
        return params

    to_sampling_params.watched = True  # type: ignore[attr-defined]
    return to_sampling_params


def _without_cartridge(convert: Callable[..., Any], frontends: Frontends) -> Callable[..., Any]:
    @functools.wraps(convert)
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        _unnest(self)
        extra = {**(getattr(self, "vllm_xargs", None) or {}), "kv_transfer_params": self.kv_transfer_params}
        for frontend in frontends.all():
            # one that every request uses is found again in each request that the search makes
            if (entry := _find(frontend, extra)) is not None and _find(frontend, None) != entry:
                raise VLLMValidationError(f"cartridge {entry.cartridge_id!r}: cannot be named in a beam search")
        return convert(self, *args, **kwargs)

    return to_beam_search_params


def _find(frontend: Frontend, extra_args: Mapping[str, Any] | None) -> Any:
    try:
        return frontend.find(extra_args)
    except KvistError as error:
        raise refusal(error) from error


def _unnest(body: Any) -> None:
    nested = (body.model_extra or {}).get("extra_body")
    params = nested.get("kv_transfer_params") if isinstance(nested, dict) else None
    if body.kv_transfer_params is None and isinstance(params, dict):
        body.kv_transfer_params = params


# -- the engine core ---------------------------------------------------------------------------------------------


def enter_placing(prefix: Callable[[Mapping[str, Any], int], tuple[list[int], int]]) -> None:
    """Put a cartridge's tokens before the prompt of every request that says so, before its blocks are hashed.

    Idempotent. The API process, which counts and returns what the client sent, is not told of them.

    Args:
        prefix: for a request's ``kv_transfer_params``, and given what stands for a token without an id: the ids, and
            how many of the prompt's first ones are left out for them.
    """
    from vllm.v1.engine.core import EngineCore

    preprocess = EngineCore.preprocess_add_request
    if hasattr(preprocess, "places"):
        return

    @functools.wraps(preprocess)
    def preprocess_add_request(self: Any, request: Any) -> Any:
        params = request.sampling_params
        transfer = ((params.extra_args if params is not None else None) or {}).get("kv_transfer_params")
        ids: list[int] = []
        if isinstance(transfer, Mapping):
            ids, skips = prefix(transfer, _placeholder(self.vllm_config))
        if not ids:
            return preprocess(self, request)
        request = copy.copy(request)  # where there is one process, it is the API's too
        request.prompt_token_ids = [*ids, *request.prompt_token_ids[skips:]]
        prepared = preprocess(self, request)
        prepared[0].prefill_stats = OwnStats(len(ids))
        return prepared

    preprocess_add_request.places = True  # type: ignore[attr-defined]
    EngineCore.preprocess_add_request = preprocess_add_request


def _placeholder(vllm_config: Any) -> int:
    """What begins every text, and is never sampled: so a penalty on a prompt's tokens changes nothing by it."""
    begin = _begin(vllm_config)
    return 0 if begin is None else begin


def _begin(vllm_config: Any) -> int | None:
    config = vllm_config.model_config
    begin = getattr(config.hf_text_config, "bos_token_id", None)
    return begin if type(begin) is int and 0 <= begin < config.get_vocab_size() else None


class OwnStats(PrefillStats):
    """What of a prefill is the client's: vLLM counts the cartridge's tokens, its users are told of their own."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self._prefix = prefix

    def set(self, num_prompt_tokens: int, num_local_cached_tokens: int, num_external_cached_tokens: int) -> None:
        """See the base class."""
        local = max(0, num_local_cached_tokens - self._prefix)
        cached = max(0, num_local_cached_tokens + num_external_cached_tokens - self._prefix)
        super().set(num_prompt_tokens - self._prefix, local, cached - local)

    def finalize(self, num_cached_tokens: int) -> None:
        """See the base class."""
        super().finalize(max(0, num_cached_tokens - self._prefix))
