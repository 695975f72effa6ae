"""Which KV heads a tensor-parallel rank holds. Pure."""

from __future__ import annotations

from kvist.errors import InvalidInput


def rank_heads(num_kv_heads: int, tp_size: int, rank: int) -> range:
    """KV heads of one rank, by vLLM's rule (`QKVParallelLinear`).

    Up to as many ranks as heads, each holds an equal run of them. With more ranks than heads each head is held by
    ``tp_size / num_kv_heads`` neighbouring ranks.

    Args:
        num_kv_heads: of the whole model.
        tp_size: number of ranks.
        rank: from 0.

    Raises:
        InvalidInput: the heads cannot be dealt out evenly, or there is no such rank.
    """
    if num_kv_heads < 1 or tp_size < 1:
        raise InvalidInput(f"expected at least one KV head and one rank, got {num_kv_heads} and {tp_size}")
    if not 0 <= rank < tp_size:
        raise InvalidInput(f"expected a rank from 0 to {tp_size - 1}, got {rank}")
    if tp_size <= num_kv_heads:
        each, left = divmod(num_kv_heads, tp_size)
        first = rank * each
    else:
        each, left = 1, tp_size % num_kv_heads
        first = rank // (tp_size // num_kv_heads)
    if left:
        raise InvalidInput(f"{num_kv_heads} KV heads cannot be dealt out evenly to {tp_size} tensor-parallel ranks")
    return range(first, first + each)
