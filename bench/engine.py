"""The embedded engine: what canonical tiles cost, and what a snapshot and a restore save.

    python bench/engine.py [--json FILE]

A tiny random model on this machine's CPU. transformers and kvist take turns in one process; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from kvist.engines.hf import Engine, HfPager, SamplingParams
from kvist.pager import Arena, capture, restore
from kvist.repo import Repository
from kvist.testing.models import make_model

PAGES = 1024


def ids(count: int, seed: int) -> list[int]:
    return [(seed * 7919 + i * i * 31 + i * 17) % 500 + 3 for i in range(count)]


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def generate(engine: Engine, prompt: list[int], tokens: int, **options: str) -> list[int]:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    return [step.token_id for step in engine.submit(prompt, params, **options)]


def cost_of_tiles(engine: Engine, model_dir: Path) -> dict[str, float]:
    """Tokens per second of prefill and decode, against transformers' own generate with a contiguous cache."""
    plain = AutoModelForCausalLM.from_pretrained(model_dir).eval()

    def ours(prompt: int, tokens: int, seed: int) -> float:
        return timed(lambda: generate(engine, ids(prompt, seed), tokens))

    def theirs(prompt: int, tokens: int, seed: int) -> float:
        batch = torch.tensor([ids(prompt, seed)])
        with torch.inference_mode():
            return timed(
                lambda: plain.generate(
                    batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
                )
            )

    result = {}
    for what, prompt, tokens, count in (("prefill", 1024, 1, 1024), ("decode", 16, 128, 128)):
        pairs = [(ours(prompt, tokens, 100 + i), theirs(prompt, tokens, 100 + i)) for i in range(7)]
        kvist_s, generate_s = (statistics.median(times) for times in zip(*pairs, strict=True))
        result[f"{what} kvist tokens/s"] = count / kvist_s
        result[f"{what} generate tokens/s"] = count / generate_s
        result[f"{what} ratio"] = result[f"{what} kvist tokens/s"] / result[f"{what} generate tokens/s"]
    return result


def two_snapshots(engine: Engine, directory: Path) -> dict[str, float]:
    """A 4,000-token session of 32 KB of cache a token, and again 50 tokens later."""
    result: dict[str, list[float]] = {}
    arena = Arena()
    for seed in range(5):
        repo = Repository.init((directory / f"two-{seed}").as_uri())
        generate(engine, ids(3990, seed), 11, sequence_id="session")
        pager = HfPager(engine, ["session"])
        first = capture(pager, repo, branch="session", arena=arena)
        generate(engine, [], 50, resume="session", sequence_id="later")
        second = capture(HfPager(engine, ["later"]), repo, parents=[first.snapshot.cid], branch="session", arena=arena)
        engine.drop("session")
        engine.drop("later")
        pairs = {
            "first pause ms": first.pause_s * 1e3,
            "second pause ms": second.pause_s * 1e3,
            "first total ms": first.total_s * 1e3,
            "second total ms": second.total_s * 1e3,
            "first MB": first.new_bytes / 1e6,
            "second MB": second.new_bytes / 1e6,
            "pause ratio": second.pause_s / first.pause_s,
            "bytes ratio": second.new_bytes / first.new_bytes,
        }
        for name, value in pairs.items():
            result.setdefault(name, []).append(value)
        repo.close()
    return {name: statistics.median(values) for name, values in result.items()}


def restore_or_prefill(make: Callable[[], Engine], url: str, tokens: int, reps: int = 3) -> dict[str, float]:
    """Time to the first new token in a fresh engine: restore and go on, or prefill again."""
    prompt = ids(tokens, tokens)
    arena = Arena()
    times: dict[str, list[float]] = {"snapshot": [], "restore": [], "prefill": []}
    with Repository.init(url) as repo:
        for rep in range(reps):
            with make() as engine:
                times["prefill"].append(timed(lambda: generate(engine, prompt, 1, sequence_id="s")))
                captured = capture(HfPager(engine), repo, branch=f"s{rep}", arena=arena)
                times["snapshot"].append(captured.total_s)
            with make() as engine:
                started = time.perf_counter()
                restore(HfPager(engine), repo, f"s{rep}", arena=arena)
                generate(engine, [], 1, resume="s")
                times["restore"].append(time.perf_counter() - started)
            page_bytes = 2 * engine.layout.page_bytes
    restore_s, prefill_s = statistics.median(times["restore"]), statistics.median(times["prefill"])
    return {
        "tokens": tokens,
        "MB": captured.pages * page_bytes / 1e6,
        "snapshot ms": statistics.median(times["snapshot"]) * 1e3,
        "restore to first token ms": restore_s * 1e3,
        "prefill to first token ms": prefill_s * 1e3,
        "ratio": prefill_s / restore_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    console = Console(width=110)
    with tempfile.TemporaryDirectory(prefix="kvist-bench-", dir=Path.cwd()) as name:
        directory = Path(name)
        model = make_model(directory / "model")

        def make() -> Engine:
            return Engine.load(model, pages=PAGES)

        with make() as engine:
            tiles = cost_of_tiles(engine, model)
        wide = make_model(directory / "wide", layers=8, kv_heads=8, head_dim=64)
        with Engine.load(wide, pages=PAGES) as engine:
            two = two_snapshots(engine, directory)
        rows = [
            restore_or_prefill(make, (directory / f"first-token-{tokens}").as_uri(), tokens)
            for tokens in (500, 1000, 2000, 4000)
        ]
    for title, figures in (("canonical tiles against transformers' generate", tiles), ("4,000 tokens, +50", two)):
        table = Table("what", "", title=title)
        for what, value in figures.items():
            table.add_row(what, f"{value:,.3f}")
        console.print(table)
    table = Table(*rows[0], title="first new token in a fresh engine")
    for row in rows:
        table.add_row(*(f"{value:,.1f}" for value in row.values()))
    console.print(table)
    if args.json:
        args.json.write_text(json.dumps({"tiles": tiles, "two snapshots": two, "first token": rows}, indent=1))


if __name__ == "__main__":
    main()
