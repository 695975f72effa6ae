"""What of SGLang is looked at beyond its plugin hooks, in one place: its configuration, its pools, its requests.

Run on sglang 0.5.23, on the CPU. Another version is refused, and so is every configuration that was never run. To move
to a new one: read this file and `hooks`, run `make test-sglang`, and widen `VERSIONS`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.common import evict_from_tree_cache
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import get_disagg, get_exec, get_memory, get_model, get_parallel, get_serving

import sglang
from kvist.engines.paged import pinning
from kvist.engines.sglang.settings import VARIABLE, Settings
from kvist.errors import EngineError, UnsupportedModel
from kvist.layout import Layout

VERSIONS: Final = ("0.5.23",)

_DTYPES: Final = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


def release() -> str:
    """The SGLang that runs, without its build."""
    return str(sglang.__version__).split("+")[0]


def check(scheduler: Any) -> None:
    """Refuse what was never run, by name.

    Raises:
        EngineError: a version not in `VERSIONS`.
        UnsupportedModel: a model or a configuration.
    """
    if release() not in VERSIONS:
        raise EngineError(f"kvist runs on sglang {', '.join(VERSIONS)}; this is {release()}")
    parallel, memory, tree = get_parallel(), get_memory(), scheduler.tree_cache
    refused = {
        "tensor parallelism": parallel.tp_size > 1,
        "pipeline parallelism": parallel.pp_size > 1,
        "data parallelism": parallel.num_dp_ranks > 1,
        "--enable-pdmux": scheduler.enable_pdmux,
        "context parallelism": parallel.attn_cp_size > 1 or parallel.dcp_enabled,
        "prefill and decode on different servers": get_disagg().disaggregation_mode != "null",
        "speculative decoding": not scheduler.spec_algorithm.is_none(),
        "LoRA": scheduler.enable_lora,
        "embedding models": not scheduler.is_generation,
        "diffusion language models": scheduler.dllm_config is not None,
        "several tokenizer workers": get_serving().tokenizer_worker_num > 1,
        "a server in Rust": scheduler.rust_server is not None,
        "--disable-radix-cache": memory.disable_radix_cache,
        "--enable-hierarchical-cache": memory.enable_hierarchical_cache,
        "--enable-lmcache": memory.enable_lmcache,
        "--enable-hisparse": memory.enable_hisparse,
        "--enable-unified-memory": memory.enable_unified_memory,
        "--enable-session-radix-cache": memory.enable_session_radix_cache,
        "--enable-streaming-session": get_serving().enable_streaming_session,
        f"a prefix cache of {type(tree).__name__}": type(tree) is not UnifiedRadixCache,
    }
    for name, is_so in refused.items():
        if is_so:
            raise UnsupportedModel(
                f"kvist does not support {name} in SGLang: it was never run",
                hint="start SGLang without it, or without KVIST_SGLANG",
            )
    parts = [part.value for part in tree.tree_components]
    if tuple(tree.tree_components) != (ComponentType.FULL,):
        raise UnsupportedModel(f"the prefix cache is of {', '.join(map(str, parts))}, expected full attention alone")
    if tree.linker is not None or tree.tree_core.is_eagle:
        raise UnsupportedModel("kvist does not support a prefix cache with a linker, or of bigrams, in SGLang")
    check_pool(scheduler.token_to_kv_pool_allocator)


def check_pool(allocator: Any) -> None:
    """Refuse a pool whose pages are not plain K and V, or one latent vector, token by token.

    Raises:
        UnsupportedModel: naming what it is.
    """
    pool = allocator.get_kvcache()
    kinds = (TokenToKVPoolAllocator, PagedTokenToKVPoolAllocator)
    if type(allocator) not in kinds:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise UnsupportedModel(f"the pool is shared out by {type(allocator).__name__}, expected {names}")
    if type(pool) not in (MHATokenToKVPool, MLATokenToKVPool):
        raise UnsupportedModel(f"the KV cache is {type(pool).__name__}, expected MHATokenToKVPool or MLATokenToKVPool")
    if pool.store_dtype not in _DTYPES or pool.store_dtype != pool.dtype:
        raise UnsupportedModel(f"the KV cache holds {pool.dtype}, expected one of {', '.join(map(str, _DTYPES))}")
    if pool.layer_shard_enabled or pool.post_capture_active:
        raise UnsupportedModel("the KV cache is sharded by layers, or backed after graphs are captured")
    if isinstance(pool, MHATokenToKVPool):
        if pool.kv_cache_layout != "nhd":
            raise UnsupportedModel(f"the KV cache is laid out {pool.kv_cache_layout!r}, expected 'nhd'")
        if pool.k_scale_buffer is not None:
            raise UnsupportedModel("the KV cache has scales beside it, expected plain K and V")
        if pool.head_dim != pool.v_head_dim:
            raise UnsupportedModel(
                f"a head of K has {pool.head_dim} elements and one of V {pool.v_head_dim}, expected as many"
            )
    elif pool.use_dsa or pool.kv_scale_buffer is not None or pool.kv_cache_dim % 2:
        raise UnsupportedModel(
            f"the latent cache has {pool.kv_cache_dim} elements a token"
            f"{', and an index or scales beside it' if pool.use_dsa or pool.kv_scale_buffer is not None else ''}; "
            "expected an even number, and nothing beside it"
        )


# -- layouts -----------------------------------------------------------------------------------------------------


def layout(scheduler: Any, settings: Settings) -> Layout:
    """The layout of this engine's pages.

    Raises:
        UnsupportedModel: nothing pins the weights.
    """
    allocator = scheduler.token_to_kv_pool_allocator
    directory = Path(get_model().model_path)
    return layout_of(allocator, settings.model or directory.name, _pinned(scheduler, directory, settings.revision))


def layout_of(allocator: Any, model: str, pinned: str) -> Layout:
    """The layout of a pool's pages; see `check_pool`."""
    pool = allocator.get_kvcache()
    is_mla = isinstance(pool, MLATokenToKVPool)
    return Layout(
        page_size_tokens=allocator.page_size,
        n_layers=pool.layer_num,
        n_heads=1 if is_mla else pool.head_num,
        head_dim=pool.kv_cache_dim // 2 if is_mla else pool.head_dim,
        dtype=_DTYPES[pool.store_dtype],
        model=model,
        revision=pinned,
        attention="mla" if is_mla else "full",
    )


def _pinned(scheduler: Any, directory: Path, given: str | None) -> str:
    """What decides the KV of given tokens: the weights, and what the command line changes about the model."""
    model, overrides = get_model(), scheduler.server_args.json_model_override_args
    changes = {"overrides": None if overrides in (None, "", "{}") else overrides, "quantization": model.quantization}
    return pinning.pinned(directory, given=given, asked=model.revision, changes=changes, option=f"in {VARIABLE}")


def numerics(scheduler: Any) -> dict[str, Any]:
    """What besides the layout decides the bits that this engine computes."""
    kernel, device = get_exec().kernel, torch.device(scheduler.token_to_kv_pool_allocator.device)
    return {
        "engine": "sglang",
        "sglang": release(),
        "torch": str(torch.__version__),
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "attention": str(kernel.attention_backend),
        "sampling": str(kernel.sampling_backend),
        "deterministic": is_deterministic(),
        "dtype": str(scheduler.model_config.dtype).removeprefix("torch."),
    }


def is_deterministic() -> bool:
    """Whether the batch does not change the bits; and only then do seeds decide what is drawn."""
    return bool(get_exec().deterministic.enable_deterministic_inference)


# -- pages ---------------------------------------------------------------------------------------------------------


def layers(allocator: Any) -> tuple[list[list[torch.Tensor]], int]:
    """The pages of each layer, as `GroupPages` takes them, and how many there are; views of the pool."""
    pool, size = allocator.get_kvcache(), allocator.page_size
    pages = (pool.size + size) // size
    if isinstance(pool, MLATokenToKVPool):
        half = pool.kv_cache_dim // 2
        latent = [buffer[: pages * size].view(pages, size, 2, 1, half) for buffer in pool.kv_buffer]
        return [[pages_of.permute(0, 2, 1, 3, 4)] for pages_of in latent], pages
    return [
        [half[: pages * size].view(pages, 1, size, *half.shape[1:]) for half in (k, v)]
        for k, v in zip(pool.k_buffer, pool.v_buffer, strict=True)
    ], pages


def take(scheduler: Any, pages: int) -> torch.Tensor | None:
    """Slots of so many free pages, in order, after evicting what nobody holds; ``None``: there is no room now.

    Args:
        scheduler: SGLang's.
        pages: how many.
    """
    allocator = scheduler.token_to_kv_pool_allocator
    evict_from_tree_cache(scheduler.tree_cache, pages * allocator.page_size)
    slots: torch.Tensor | None = allocator.alloc(pages * allocator.page_size)
    return slots


def room(scheduler: Any) -> int:
    """Tokens that are free, or nobody holds, beyond what the requests that run are reckoned to want yet."""
    held = scheduler.token_to_kv_pool_allocator.available_size() + scheduler.tree_cache.evictable_size()
    ratio = scheduler.new_token_ratio_tracker.current
    running = (each for each in requests(scheduler) if each.kv.holds_kv)
    wanted = sum(to_come(each) * (1.0 if each.sampling_params.ignore_eos else ratio) for each in running)
    return int(held - wanted)


def to_come(request: Any) -> int:
    """Tokens that a request may generate yet, as SGLang reckons before it lets it in."""
    left = int(request.sampling_params.max_new_tokens) - len(request.output_ids)
    return max(0, min(left, int(CLIP_MAX_NEW_TOKENS)))


def key(token_ids: Sequence[int], extra_key: str | None, salt: str | None) -> Any:
    """Token ids as the prefix cache knows them."""
    return RadixKey(array("q", token_ids), extra_key=extra_key, cache_salt=salt)


def match(tree: Any, token_ids: Sequence[int], extra_key: str | None, salt: str | None) -> tuple[int, Any]:
    """How many tokens the prefix cache holds from the start, in whole pages, and the node where they end."""
    found = tree.match_prefix(MatchPrefixParams(key=key(token_ids, extra_key, salt)))
    return int(found.device_prefix_len), found.last_device_node


def insert(
    tree: Any, token_ids: Sequence[int], extra_key: str | None, salt: str | None, slots: torch.Tensor, known: int
) -> Any:
    """Let the prefix cache own the slots of some tokens; those that it has meanwhile got by itself are freed.

    Args:
        tree: SGLang's.
        token_ids: whole pages of them, from the start.
        extra_key, salt: what keeps them apart.
        slots: of all of them.
        known: how many of the first are the tree's own.

    Returns:
        The node where they end.
    """
    made = tree.insert(InsertParams(key=key(token_ids, extra_key, salt), value=slots, prev_prefix_len=known))
    return made.last_device_node


def synchronize(device: torch.device | str) -> None:
    """Return when all that was launched is computed."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


# -- requests ------------------------------------------------------------------------------------------------------


def is_at_rest(scheduler: Any) -> bool:
    """Whether nothing is computed, though SGLang is not paused."""
    batches = (scheduler.running_batch, scheduler.last_batch)
    is_computing = scheduler.chunked_req is not None or any(
        batch is not None and not batch.is_empty() for batch in batches
    )
    return not is_computing and not scheduler._engine_paused


def take_back(scheduler: Any, request: Any) -> None:
    """Take a request that waits out of SGLang's queue."""
    scheduler.waiting_queue = [each for each in scheduler.waiting_queue if each is not request]


def requests(scheduler: Any) -> Iterator[Any]:
    """Every request that SGLang runs or lets wait, each once."""
    batches = (scheduler.running_batch, scheduler.last_batch)
    running = [request for batch in batches if batch is not None for request in batch.reqs]
    chunked = [scheduler.chunked_req] if scheduler.chunked_req is not None else []
    seen: set[int] = set()
    for request in (*running, *chunked, *scheduler.waiting_queue, *scheduler.grammar_manager.grammar_queue):
        if id(request) not in seen and not request.finished():
            seen.add(id(request))
            yield request


def is_refused(request: Any) -> bool:
    """Whether SGLang put one token in place of a request's own, to end it with an error by one cheap step."""
    why = request.finished_reason or request.to_finish
    return getattr(why, "err_type", None) is not None


def is_plain(request: Any) -> bool:
    """Whether a request is one sequence of text alone: what it computes follows from its token ids."""
    return (
        request.multimodal_inputs is None
        and request.input_embeds is None
        and request.positional_embed_overrides is None
        and request.token_type_ids is None
        and request.session is None
        and request.lora_id is None
        and request.beam_group is None  # its tokens are elsewhere, and its pages change owners
        and not request.is_prefill_only
        and not is_refused(request)
    )


def token_ids(request: Any) -> list[int]:
    """All tokens of a request that are known."""
    return [*request.origin_input_ids, *request.output_ids_through_stop]


def computed(request: Any) -> int:
    """Tokens whose KV is computed once all that was launched is; the last sampled one is not."""
    if not request.kv.holds_kv:
        return 0
    known = len(request.origin_input_ids) + len(request.output_ids_through_stop)
    return max(0, min(int(request.kv.kv_committed_len), known - 1))


def pages(scheduler: Any, request: Any, tokens: int) -> torch.Tensor:
    """The pages that hold the first ``tokens`` tokens of a request; a copy, on the pool's device."""
    size = scheduler.token_to_kv_pool_allocator.page_size
    row: torch.Tensor = scheduler.req_to_token_pool.req_to_token[request.kv.req_pool_idx]
    found: torch.Tensor = row[:tokens:size].to(torch.int64) // size
    return found
