"""Cartridges in vLLM: time to first token of a cartridge against prefill of as many tokens, on one server.

    python bench/cartridges.py [--tokens 256,512,1024,2048,4096,8192,16384] [--repeat 3] [--shape realistic]
                               [--dtype auto] [--directory DIR] [--json FILE]

For the interpreter that has vLLM and kvist. A random model of 143 million parameters, eager; in bfloat16 where the CPU
has instructions for it, else in float32, which then is faster to prefill. One real server, over HTTP, with kvist's
CartridgeConnector and vLLM's prefix cache. A cartridge holds random numbers: their bytes are what takes time, and that
all of them were used is read from the answers. Contestants take turns, so that a neighbour's noise falls on all of
them; what is printed is the median of the repetitions, and a ratio of two times the median of the ratios of each turn.
Every request asks a question of 32 tokens, random and new. The arms, of as many tokens before the question:

    prefill   the text is in the prompt
    first     the cartridge is used for the first time: read (from the page cache), verified, packed, injected
    injected  it is in host memory, and none of its blocks in vLLM's prefix cache (a cache_salt of its own)
    shared    its blocks are in vLLM's prefix cache: another request has just used them
    hit       the text is in the prompt, and in vLLM's prefix cache

The speed of an injection is what the worker measured, from host memory into the cache's blocks; beside it a memcpy of
as many bytes, the fastest of three, on one thread, which an injection has, and on all cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from asking import CORES, Limits, Row, first_token, has_bfloat16, ids, median, only, ratio, read_all, show, wake  # noqa: E402

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]  # bench/vllm.py is no vllm
os.environ["PYTHONSAFEPATH"] = "1"

import torch  # noqa: E402
from rich.console import Console  # noqa: E402

from kvist.cartridge.cartridge import Cartridge  # noqa: E402
from kvist.cartridge.model import ModelIdentity  # noqa: E402
from kvist.testing.models import SHAPES, make_shape  # noqa: E402
from kvist.testing.vllm import VllmServer  # noqa: E402

BLOCK = 32
QUESTION = 32
ARMS = ("prefill", "first", "injected", "shared", "hit")
STATS = "/v1/kvist/stats"
WARM = "warm"


@dataclass(frozen=True)
class Setup:
    """What is measured, and where."""

    model: ModelIdentity
    path: Path
    directory: Path
    tokens: list[int]
    repeat: int

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of a token."""
        model = self.model
        return 2 * model.num_layers * model.num_kv_heads * model.head_dim * getattr(torch, model.dtype).itemsize

    def cartridge(self, tokens: int, rep: int | str) -> Path:
        """Where a cartridge is; made if it is not there."""
        path = self.directory / f"cartridge-{tokens}-{rep}"
        if not path.exists():
            generator = torch.Generator().manual_seed(hash((tokens, rep)) % 2**31)
            shape = (tokens, self.model.num_kv_heads, self.model.head_dim)
            dtype = getattr(torch, self.model.dtype)
            layers = [
                (torch.randn(shape, generator=generator).to(dtype), torch.randn(shape, generator=generator).to(dtype))
                for _ in range(self.model.num_layers)
            ]
            Cartridge.create(layers, self.model, cartridge_id=path.name).save_pretrained(path)
        return path

    @contextmanager
    def server(self, cartridges: list[Path]) -> Iterator[VllmServer]:
        """A warm server of these cartridges. It has host memory, and a KV cache, for three of the longest."""
        room = 3 * max(self.tokens) * self.token_bytes
        listed = [{"cartridge_id": path.name, "path": str(path)} for path in cartridges]
        config = {
            "kv_connector": "CartridgeConnector",
            "kv_connector_module_path": "kvist.engines.vllm.cartridges",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"cartridges": listed, "host_bytes": max(room, 1 << 30)},
        }
        server = VllmServer(
            self.path,
            None,
            *("--max-num-batched-tokens", "8192", "--max-model-len", str(max(self.tokens) + 2 * QUESTION)),
            config=config,
            dtype=self.model.dtype,
            block_size=BLOCK,
            env={"VLLM_CPU_KVCACHE_SPACE": str(-(-room // (1 << 30)) + 1)},
        )
        try:
            server.wait()
            server.http.timeout = 3600.0  # a prefill of 16 thousand tokens takes its time
            yield server
        finally:
            server.kill()


def ask(server: VllmServer, before: list[int], cartridge: str | None = None, salt: str | None = None) -> Row:
    """A first token: its time, what the worker injected for it, and how many tokens were not computed."""
    wake(server)
    fields: dict[str, Any] = {} if salt is None else {"cache_salt": salt}
    if cartridge is not None:
        fields["kv_transfer_params"] = {"cartridge_id": cartridge, "cartridge_prefix": "virtual"}
    earlier = stats(server)
    got = first_token(server, before + ids(QUESTION, random.random()), **fields)
    later = stats(server)
    told = {name: later[name] - earlier[name] for name in ("bytes_injected", "injection_seconds", "misses")}
    used = (got.transfer or {}).get("cartridge", {})
    return {"ms": got.ms, "cached": got.cached, "used": used.get("tokens", 0), **told}


def stats(server: VllmServer) -> dict[str, float]:
    """Of the only worker."""
    found: dict[str, float] = server.get(STATS)["ranks"][0]
    return found


def check(setup: Setup, tokens: int, got: dict[str, Row]) -> None:
    """That each arm did what it is called.

    Raises:
        RuntimeError: one of them did something else.
    """
    nbytes = tokens * setup.token_bytes
    expected = {
        "prefill": {"cached": 0, "used": 0, "bytes_injected": 0},
        "first": {"used": tokens, "bytes_injected": nbytes, "misses": 1},
        "injected": {"used": tokens, "bytes_injected": nbytes, "misses": 0},
        "shared": {"used": tokens, "bytes_injected": 0},
        "hit": {"cached": tokens, "used": 0, "bytes_injected": 0},
    }
    for arm, facts in expected.items():
        wrong = {name: got[arm][name] for name, value in facts.items() if got[arm][name] != value}
        if wrong:
            raise RuntimeError(f"{arm} of {tokens} tokens: expected {facts}, got {wrong}")


def measure(setup: Setup) -> dict[str, list[Row]]:
    """All lengths, as often as they are repeated; the longest last, so that the short ones are known soon."""
    cartridges = {(tokens, rep): setup.cartridge(tokens, rep) for tokens in setup.tokens for rep in range(setup.repeat)}
    warm = setup.cartridge(min(setup.tokens), WARM)
    longest = max(setup.tokens) * setup.token_bytes
    limits = Limits(setup.directory, longest, BLOCK * setup.token_bytes // 2)
    runs: dict[int, list[dict[str, Row]]] = {tokens: [] for tokens in setup.tokens}
    copies: dict[int, list[tuple[float, float]]] = {tokens: [] for tokens in setup.tokens}
    with setup.server([warm, *cartridges.values()]) as server:
        for count in (40, 500, 40):
            first_token(server, ids(min(count, max(setup.tokens)), random.random()))
        for salt in ("one", "two", "two"):
            ask(server, [], warm.name, salt)
        for tokens in setup.tokens:
            for rep in range(setup.repeat):
                name, text = cartridges[tokens, rep].name, ids(tokens, f"text-{rep}")
                read_all(cartridges[tokens, rep])
                got = {"prefill": ask(server, text)}
                got["hit"] = ask(server, text)
                got["first"] = ask(server, [], name, "first")
                got["injected"] = ask(server, [], name, "second")
                got["shared"] = ask(server, [], name, "second")
                check(setup, tokens, got)
                runs[tokens].append(got)
                nbytes = tokens * setup.token_bytes
                fastest = [min(limits.memcpy_s(nbytes, threads) for _ in range(3)) for threads in (1, CORES)]
                copies[tokens].append((fastest[0], fastest[1]))
    return {
        "time to first token, before a question of 32 tokens; x: times faster than prefill": [
            times(tokens, run) for tokens, run in runs.items()
        ],
        "speed of the injection, as the worker measured it, beside memcpy": [
            speed(tokens, tokens * setup.token_bytes, run, copies[tokens]) for tokens, run in runs.items()
        ],
    }


def times(tokens: int, run: list[dict[str, Row]]) -> Row:
    ms = {arm: [got[arm]["ms"] for got in run] for arm in ARMS}
    row: Row = {"tokens": tokens, "prefill ms": median(ms["prefill"])}
    for arm in ARMS[1:]:
        row |= {f"{arm} ms": median(ms[arm]), f"{arm} x": ratio(ms["prefill"], ms[arm])}
    row["used"] = only([got[arm]["used"] for got in run for arm in ("first", "injected", "shared")])
    return row | {"all ms": ms}


def speed(tokens: int, nbytes: int, run: list[dict[str, Row]], copies: list[tuple[float, float]]) -> Row:
    seconds = [got["injected"]["injection_seconds"] for got in run]
    row: Row = {"tokens": tokens, "MB": nbytes / 1e6, "injection ms": median(seconds) * 1e3}
    for key, taken in (("injection", seconds), ("memcpy, 1 thread", [one for one, _ in copies])):
        row[f"{key} GB/s"] = nbytes / 1e9 / median(taken)
    row[f"memcpy, {CORES} cores GB/s"] = nbytes / 1e9 / median([every for _, every in copies])
    row["injection / memcpy, 1 thread"] = ratio([one for one, _ in copies], seconds)
    row["of the first token %"] = 100 * median(
        [took * 1e3 / got["injected"]["ms"] for took, got in zip(seconds, run, strict=True)]
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--tokens", default="256,512,1024,2048,4096,8192,16384", help="multiples of 32; default: %(default)s"
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--shape", default="realistic", choices=sorted(set(SHAPES) - {"latent"}))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--directory", type=Path, default=Path.cwd(), help="for 6 GB of cartridges")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tokens = sorted({int(count) for count in args.tokens.split(",")})
    if wrong := [count for count in tokens if count < BLOCK or count % BLOCK]:
        parser.error(f"--tokens: expected multiples of {BLOCK}, got {wrong}")
    console = Console(width=max(180, Console().width))
    is_fast = has_bfloat16()
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if is_fast else "float32"
    console.print(f"{CORES} cores, {'with' if is_fast else 'without'} bfloat16 instructions; {args.shape}, {dtype}\n")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="kvist-bench-", dir=args.directory.resolve()) as name:
        directory = Path(name)
        path = make_shape(directory / "model", args.shape, dtype=dtype, max_len=max(tokens) + 2 * QUESTION)
        model = ModelIdentity.of_directory(path, dtype=dtype)
        tables = measure(Setup(model, path, directory, tokens, args.repeat))
    for title, rows in tables.items():
        show(console, title, rows)
    seconds, load = time.perf_counter() - started, os.getloadavg()[0]
    console.print(f"{seconds:,.0f} s, load of the machine {load:.1f}\n")
    if args.json:
        arguments = {key: str(value) for key, value in vars(args).items()}
        result = {
            "arguments": arguments,
            "cores": CORES,
            "dtype": dtype,
            "tables": tables,
            "seconds": seconds,
            "load": load,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
