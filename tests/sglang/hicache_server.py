"""SGLang's server with HiCache on a CPU: ``hicache_server.py ARGUMENTS of sglang.launch_server``.

HiCache of 0.5.23 knows no CPU: it pins the host pool by ``cudaHostRegister`` ("Torch not compiled with CUDA enabled"),
and moves pages between the device's pool and the host's by kernels of ``sgl_kernel``, which it imports on accelerators
only. Both are put in their place here: nothing is pinned, and the kernels are copies of the same slots. All else is
SGLang's: scheduler, radix tree, controller with its threads, host pool, factory of backends. ``torch.cpu`` has streams
and events that do nothing, which is right where every copy is done when it returns.

A spawned process imports this module again, so the patch is in every process.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

from torch import Tensor

warnings.simplefilter("ignore")

from sglang.srt.mem_cache.pool_host import common, mha, mla  # noqa: E402


def _copy(src_layers: Any, dst_layers: Any, src_indices: Tensor, dst_indices: Tensor, page_size: int) -> None:
    """``transfer_kv_direct``: slots of each layer to slots of the same."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]


def _copy_out(src_ptrs: Any, dst_ptrs: Any, src_indices: Tensor, dst_indices: Tensor, page_size: int) -> None:
    """``transfer_kv_all_layer_direct_lf_pf``: slots of all layers to pages ``[pages, layers, tokens, ...]``."""
    pages, tokens = dst_indices // page_size, dst_indices % page_size
    layers = len(src_ptrs) // len(dst_ptrs)
    for half, target in enumerate(dst_ptrs):
        for layer in range(layers):
            target[pages, layer, tokens] = src_ptrs[half * layers + layer][src_indices]


def _copy_in(
    src_ptrs: Any, dst_ptrs: Any, src_indices: Tensor, dst_indices: Tensor, layer_id: int, page_size: int
) -> None:
    """``transfer_kv_per_layer_direct_pf_lf``: one layer of pages to slots."""
    pages, tokens = src_indices // page_size, src_indices % page_size
    for source, target in zip(src_ptrs, dst_ptrs, strict=True):
        target[dst_indices] = source[pages, layer_id, tokens]


common._cuda_host_register = lambda buffer, granularity=None: None
for module in (mha, mla):
    module.transfer_kv_direct = _copy
    module.transfer_kv_all_layer_direct_lf_pf = _copy_out
    module.transfer_kv_per_layer_direct_pf_lf = _copy_in

if __name__ == "__main__":
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    run_server(prepare_server_args(sys.argv[1:]))
