"""All that reaches into vLLM beyond its connector interface, in one place.

Run on vllm 0.28, 0.30 and 0.32 (the CPU builds); other minor versions in between are accepted, anything outside is
refused, and so is every configuration that was never run. To move to a new version: read this file, run `make
test-vllm`, and widen `VERSIONS`.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec

import vllm
from kvist.engines.paged import pinning
from kvist.errors import EngineError, UnsupportedModel
from kvist.layout import Layout

VERSIONS: Final = ((0, 28), (0, 33))
"""First minor version, and the first after the last."""
GROUPS_FROM: Final = (0, 30)
"""From here on a load of several KV cache groups can be reported as failed."""

_DTYPES: Final = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
_SPECS: Final = (FullAttentionSpec, SlidingWindowSpec, MLAAttentionSpec)


def release() -> str:
    """The vLLM that runs, without its build."""
    return str(vllm.__version__).split("+")[0]


def version() -> tuple[int, int]:
    """Its minor version."""
    major, minor = release().split(".")[:2]
    return int(major), int(minor)


def check(vllm_config: Any, kv_cache_config: Any) -> None:
    """Refuse what was never run, by name.

    Raises:
        EngineError: a version outside `VERSIONS`.
        UnsupportedModel: a model or a configuration.
    """
    first, end = VERSIONS
    if not first <= version() < end:
        raise EngineError(
            f"kvist runs on vllm from {first[0]}.{first[1]} to before {end[0]}.{end[1]}; this is {release()}"
        )
    parallel = vllm_config.parallel_config
    refused = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "LoRA": vllm_config.lora_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "data parallelism": parallel.data_parallel_size > 1,
        "decode context parallelism": getattr(parallel, "decode_context_parallel_size", 1) > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "pooling models": vllm_config.model_config.runner_type == "pooling",
        "encoder-decoder models": vllm_config.model_config.is_encoder_decoder,
        f"several KV cache groups before vllm {GROUPS_FROM[0]}.{GROUPS_FROM[1]}": (
            len(kv_cache_config.kv_cache_groups) > 1 and version() < GROUPS_FROM
        ),
    }
    for name, is_so in refused.items():
        if is_so:
            raise UnsupportedModel(
                f"kvist does not support {name} in vLLM: it was never run",
                hint="start vLLM without it, or without the connector",
            )
    sizes = {group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups}
    if len(sizes) > 1:
        raise UnsupportedModel(f"expected one block size for all KV cache groups, got {sorted(sizes)}")
    for number, group in enumerate(kv_cache_config.kv_cache_groups):
        spec = group.kv_cache_spec
        if type(spec) not in _SPECS:
            names = ", ".join(kind.__name__ for kind in _SPECS)
            raise UnsupportedModel(f"KV cache group {number} is {type(spec).__name__}, expected one of {names}")
        if spec.dtype not in _DTYPES:
            names = ", ".join(map(str, _DTYPES))
            raise UnsupportedModel(f"KV cache group {number} holds {spec.dtype}, expected one of {names}")


def layouts(vllm_config: Any, kv_cache_config: Any, rank: int, *, is_pinned: bool = True) -> list[Layout]:
    """The layout of each KV cache group in one tensor-parallel rank.

    Args:
        vllm_config, kv_cache_config: vLLM's.
        rank: from 0.
        is_pinned: with the revision of the weights, which are read for that where nothing names it.

    Raises:
        UnsupportedModel: nothing pins the weights.
    """
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config
    path, pinned = Path(vllm_config.model_config.model), _pinned(vllm_config) if is_pinned else ""
    groups = kv_cache_config.kv_cache_groups
    found = []
    for number, group in enumerate(groups):
        spec = group.kv_cache_spec
        is_mla = isinstance(spec, MLAAttentionSpec)
        width = spec.head_size if is_mla else spec.head_size + (getattr(spec, "head_size_v", None) or spec.head_size)
        # full attention may carry a window too: of the layers that were merged into it
        window = spec.sliding_window if isinstance(spec, SlidingWindowSpec) else None
        found.append(
            Layout(
                page_size_tokens=spec.block_size,
                n_layers=len(group.layer_names),
                n_heads=spec.num_kv_heads,
                head_dim=width // 2,
                dtype=_DTYPES[spec.dtype],
                model=extra.get("model") or path.name,
                revision=pinned,
                memory_order=_memory_order(spec),
                tp_rank=rank,
                tp_size=vllm_config.parallel_config.tensor_parallel_size,
                attention="mla" if is_mla else "full" if window is None else f"sliding:{window}",
                group=number,
                n_groups=len(groups),
            )
        )
    return found


def _pinned(vllm_config: Any) -> str:
    """What decides the KV of given tokens: the weights, and what the command line changes about the model."""
    given = vllm_config.kv_transfer_config.kv_connector_extra_config.get("revision")
    return pinned(vllm_config, Path(vllm_config.model_config.model), given)


def pinned(vllm_config: Any, directory: Path, given: str | None = None) -> str:
    """The same, of a model whose files are in ``directory``.

    Raises:
        UnsupportedModel: nothing says which weights they are.
    """
    config = vllm_config.model_config
    changes = {"hf_overrides": config.hf_overrides or None, "quantization": config.quantization}
    return pinning.pinned(directory, given=given, asked=config.revision, changes=changes, option="to the connector")


def _memory_order(spec: Any) -> str:
    isa = attention_isa(spec)
    return "LHND" if isa is None else f"vllm-cpu-{isa}"


def attention_isa(spec: Any) -> str | None:
    """How the CPU kernels pack a block, or ``None``: token by token, as everywhere else (and for MLA on the CPU)."""
    if not vllm.platforms.current_platform.is_cpu() or isinstance(spec, MLAAttentionSpec):
        return None
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return str(_get_attn_isa(spec.dtype, spec.block_size, spec.head_size))


def numerics(vllm_config: Any, kv_cache_config: Any) -> dict[str, Any]:
    """What besides the layout decides the bits that this worker computes."""
    from vllm import envs

    config = vllm_config.model_config
    mode = vllm_config.compilation_config.mode
    device = vllm.platforms.current_platform
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    return {
        "engine": "vllm",
        "vllm": release(),
        "torch": str(torch.__version__),
        "device": "cpu" if device.is_cpu() else device.get_device_name(),
        "threads": torch.get_num_threads(),
        "attention": attention_isa(spec) or "default",
        "split_kv": os.environ.get("VLLM_CPU_ATTN_SPLIT_KV", "1"),
        "onednn_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        "compiled": not config.enforce_eager and mode is not None and int(mode) > 0 and not _dynamo_is_off(),
        "batch_invariant": bool(getattr(envs, "VLLM_BATCH_INVARIANT", False)),
        "dtype": str(config.dtype).removeprefix("torch."),
        "block_hash": f"{algorithm}:{_hash_seed(algorithm)}",
    }


def hashes_are_random(vllm_config: Any) -> bool:
    """Whether block hashes mean nothing outside this process."""
    return _hash_seed(vllm_config.cache_config.prefix_caching_hash_algo) == "random"


def _hash_seed(algorithm: str) -> str:
    """What vLLM derives the parent of all first blocks from."""
    is_fixed = algorithm.startswith("sha256") and version() >= (0, 30)
    return os.environ.get("PYTHONHASHSEED", "default" if is_fixed else "random")


def _dynamo_is_off() -> bool:
    return os.environ.get("TORCHDYNAMO_DISABLE") == "1"


# -- the scheduler's side ----------------------------------------------------------------------------------------


class Blocks:
    """The scheduler's block pool, and how often each of its blocks was handed out."""

    def __init__(self, pool: Any, size: int) -> None:
        """Take vLLM's pool of blocks of ``size`` tokens.

        Raises:
            UnsupportedModel: blocks are hashed in other sizes than they are kept.
        """
        if pool.hash_block_size != size:
            raise UnsupportedModel(
                f"expected blocks of {size} tokens to be hashed whole, got hashes of {pool.hash_block_size}"
            )
        self._pool = pool
        self.generation = [0] * pool.num_gpu_blocks
        hand_out = pool.get_new_blocks

        def counted(num_blocks: int) -> Any:
            blocks = hand_out(num_blocks)
            for block in blocks:
                self.generation[block.block_id] += 1
            return blocks

        pool.get_new_blocks = counted

    @property
    def caching(self) -> bool:
        """Whether prefix caching is on."""
        return bool(self._pool.enable_caching)

    def hash_of(self, block_id: int) -> tuple[int, bytes] | None:
        """Group and block hash of a block in the prefix cache."""
        key = self._pool.blocks[block_id].block_hash
        return None if key is None else (kv_cache_utils.get_group_id(key), kv_cache_utils.get_block_hash(key))

    def cached(self) -> Iterator[tuple[int, int, bytes]]:
        """Block id, group and block hash of all that the prefix cache holds, each hash once."""
        seen = set()
        for block in self._pool.blocks:
            key = block.block_hash
            if key is not None and not block.is_null and key not in seen:
                seen.add(key)
                yield block.block_id, kv_cache_utils.get_group_id(key), kv_cache_utils.get_block_hash(key)

    def pin(self, block_ids: Iterable[int]) -> None:
        """Keep blocks from being handed out again."""
        self._pool.touch([self._pool.blocks[block_id] for block_id in block_ids])

    def unpin(self, block_ids: Sequence[int]) -> None:
        """Undo one `pin`. What nobody else holds stays readable as long as may be."""
        last = self.only_pinned(block_ids) if self.can_linger else []
        last = [block_id for block_id in last if self._pool.blocks[block_id].block_hash is None]
        self.linger(last)
        kept = set(last)
        rest = [block_id for block_id in reversed(block_ids) if block_id not in kept]
        self._pool.free_blocks([self._pool.blocks[block_id] for block_id in rest])

    def only_pinned(self, block_ids: Sequence[int]) -> list[int]:
        """Those that one `pin` holds, and nobody else."""
        return [block_id for block_id in block_ids if self._pool.blocks[block_id].ref_cnt == 1]

    @property
    def can_linger(self) -> bool:
        """Whether `linger` can be had."""
        return hasattr(self._pool, "unpin_blocks")  # from 0.30

    def linger(self, block_ids: Sequence[int]) -> None:
        """Undo one `pin`, so that blocks which no hash names are reused last instead of first."""
        if block_ids:
            self._pool.unpin_blocks([self._pool.blocks[block_id] for block_id in block_ids], lambda block: None)


def is_plain(request: Any) -> bool:
    """Whether a request is text alone: what it computes follows from its token ids."""
    return (
        request.sampling_params is not None
        and request.lora_request is None
        and not request.mm_features
        and request.prompt_embeds is None
        and request.prompt_token_ids is not None
        and not request.resumable
    )


def computed_tokens(request: Any) -> int:
    """Tokens whose KV is surely in the cache: steps in flight do not count, nor does the last sampled token."""
    computed: int = min(request.num_computed_tokens - request.num_in_flight_tokens, request.num_tokens - 1)
    return max(0, computed)


@contextmanager
def salted(request: Any, salt: str | None) -> Iterator[list[bytes]]:
    """The block hashes that a request would have under a salt; inside, it has them."""
    before = request.cache_salt, request.block_hashes
    request.cache_salt, request.block_hashes = salt, []
    request.update_block_hashes()
    try:
        yield request.block_hashes
    finally:
        request.cache_salt, request.block_hashes = before


def salt_of_failed(request: Any, salt: str | None) -> str | None:
    """The salt of a request whose pages could not be had. Before 0.30 it keeps blocks that others must not find."""
    return salt if version() >= GROUPS_FROM else f"kvist:failed:{request.request_id}"


def resalt(request: Any, salt: str | None) -> None:
    """Give a request that has not been scheduled another salt, so that it shares blocks only under that."""
    request.cache_salt = salt
    request.block_hashes.clear()
    request.update_block_hashes()


def local_hit(manager: Any, request: Any) -> int:
    """Tokens that the prefix cache has for a request, without any effect on statistics."""
    if not manager.enable_caching:
        return 0
    hit: int = manager.coordinator.find_longest_cache_hit(request.block_hashes, request.num_tokens - 1)[1]
    return hit


def become_output(request: Any, prompt_tokens: int) -> None:
    """Of a request about to run for the first time: from ``prompt_tokens`` on, its prompt was generated."""
    output = request.prompt_token_ids[prompt_tokens:]
    request.num_prompt_tokens = prompt_tokens
    request._output_token_ids[:0] = output
    request.max_tokens += len(output)


def find_connector(connector: Any, kind: type[Any]) -> Any:
    """Our connector, where it is one of several; ``None`` if it is not there."""
    children = [connector, *getattr(connector, "_connectors", ())]
    return next((child for child in children if isinstance(child, kind)), None)


# -- the worker's side -------------------------------------------------------------------------------------------


def generator_of(runner: Any, request_id: str) -> torch.Generator | None:
    """The sampler's generator of a running request; ``None`` if it is not seeded, or draws without state."""
    request = getattr(runner, "requests", {}).get(request_id)
    return None if request is None else request.generator


def carries_output(runner: Any) -> bool:
    """Whether `tell_output` works: the first model runner keeps what it needs on the host."""
    return hasattr(runner, "requests") and hasattr(getattr(runner, "input_batch", None), "req_output_token_ids")


def tell_output(runner: Any, request_id: str, prompt_tokens: int) -> None:
    """The worker's half of `become_output`, after the request entered the batch and before it is sampled."""
    request = runner.requests[request_id]
    batch = runner.input_batch
    index = batch.req_id_to_index[request_id]
    output = request.prompt_token_ids[prompt_tokens:]
    request.prompt_token_ids = request.prompt_token_ids[:prompt_tokens]
    request.num_prompt_tokens = prompt_tokens
    request.output_token_ids[:0] = output  # the batch and its logits processors hold this very list
    batch.num_prompt_tokens[index] = prompt_tokens
    batch.refresh_metadata()
    batch.sampling_metadata = batch._make_sampling_metadata()


def transfer_results(finished: set[str], failed: set[str]) -> Any:
    """What a worker reports of its loads, from 0.30."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

    return KVConnectorTransferResults(finished_recving=finished | failed, failed_recving=failed)


# -- the way in --------------------------------------------------------------------------------------------------


def enter_core(
    name: str, answer: Callable[[Any, str, dict[str, Any]], dict[str, Any]], prepare: Callable[[Any], None]
) -> None:
    """Let ``collective_rpc(name, args=(op, payload))`` reach the engine core, and ``answer`` there.

    Both get the engine core and run in its thread, between two steps; ``prepare`` before its first request. Idempotent.
    """
    from vllm.v1.engine.core import EngineCore

    inner, add = EngineCore.collective_rpc, EngineCore.add_request
    if getattr(inner, "answers", None) == name:
        return
    prepared: weakref.WeakSet[Any] = weakref.WeakSet()

    def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self not in prepared:
            prepared.add(self)
            prepare(self)
        return add(self, *args, **kwargs)

    def collective_rpc(
        self: Any, method: Any, timeout: Any = None, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> list[Any]:
        if method == name:
            return [answer(self, *args)]
        return list(inner(self, method, timeout, args, kwargs))

    collective_rpc.answers = name  # type: ignore[attr-defined]
    EngineCore.collective_rpc = collective_rpc
    EngineCore.add_request = add_request
