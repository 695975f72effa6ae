"""Replays beside NVIDIA Dynamo's: requests a second, from the trace file to the summary, on real traces.

    python bench/replay.py TRACE... [--reps 5] [--workers 8] [--profile] [--json FILE]

Needs KVIST_DYNAMO_PYTHON, an interpreter with ai-dynamo; without it only kvist is measured. Each contestant runs in a
process of its own, which has its libraries loaded and has replayed once; they take turns, and medians are shown. The
clock starts with the file's name and stops with the summary. Both replay with Dynamo's defaults: 16,384 blocks of 64
tokens each worker.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NUM_BLOCKS, BLOCK_SIZE, TRACE_BLOCK_SIZE = 16384, 64, 512
FIGURES = ("prefix_cache_reused_ratio", "duration_ms", "mean_ttft_ms", "mean_itl_ms")
Job = tuple[str, str, int]  # trace, router, workers


def kvist(trace: str, router: str, workers: int) -> dict[str, float]:
    from kvist.sim.config import ClusterConfig, EngineConfig
    from kvist.sim.replay import replay
    from kvist.sim.report import Report
    from kvist.sim.trace import read_trace

    engine = EngineConfig(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    cluster = ClusterConfig(workers=workers, router=router)
    read = read_trace(Path(trace), block_size=TRACE_BLOCK_SIZE)
    summary = Report(read.name, engine, cluster, replay(read, engine, cluster), 0.0).summary()
    return {name: summary[name] for name in FIGURES}


def dynamo(trace: str, router: str, workers: int) -> dict[str, float]:
    from dynamo._core import _normalize_mocker_config, run_mocker_trace_replay

    engine = {"num_gpu_blocks": NUM_BLOCKS, "block_size": BLOCK_SIZE}
    summary = run_mocker_trace_replay(
        [trace],
        extra_engine_args=_normalize_mocker_config({"engine": engine}),
        num_workers=workers,
        router_mode={"kv": "kv_router"}.get(router, router),
        replay_mode="offline",
        trace_format="mooncake",
        trace_block_size=TRACE_BLOCK_SIZE,
    ).summary
    return {name: summary[name] for name in FIGURES}


CONTESTANTS = {"kvist": kvist, "dynamo": dynamo}


def serve(name: str) -> None:
    """Replay what the lines of stdin name; a line of seconds and figures for each."""
    for line in sys.stdin:
        start = time.perf_counter()
        figures = CONTESTANTS[name](*json.loads(line))
        print(json.dumps([time.perf_counter() - start, figures]), flush=True)


class Contestant:
    """One process."""

    def __init__(self, name: str, python: str) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [python, __file__, "--serve", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"DYN_LOG": "error"},
            text=True,
        )

    def run(self, job: Job) -> tuple[float, dict[str, float]]:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with {self._process.wait()}")
        seconds, figures = json.loads(line)
        return seconds, figures

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure(jobs: list[Job], reps: int) -> list[dict[str, Any]]:
    contestants = [Contestant("kvist", sys.executable)]
    if python := os.environ.get("KVIST_DYNAMO_PYTHON"):
        contestants.append(Contestant("dynamo", python))
    rows = []
    try:
        for job in jobs:
            requests = sum(1 for line in Path(job[0]).read_text().splitlines() if line)
            taken: dict[str, list[float]] = {each.name: [] for each in contestants}
            figures = {each.name: each.run(job)[1] for each in contestants}  # warms up
            for _ in range(reps):
                for each in contestants:
                    taken[each.name].append(each.run(job)[0])
            medians = {name: statistics.median(times) for name, times in taken.items()}
            rows.append(
                {"trace": Path(job[0]).stem, "router": job[1], "workers": job[2], "requests": requests}
                | {"seconds": medians, "figures": figures}
            )
            show(rows[-1])
    finally:
        for each in contestants:
            each.close()
    return rows


def show(row: dict[str, Any]) -> None:
    seconds, figures = row["seconds"], row["figures"]
    print(f"\n{row['trace']}, {row['requests']} requests, {row['workers']} workers, {row['router']}")
    for name, taken in seconds.items():
        told = ", ".join(f"{key} {value:.4f}" for key, value in figures[name].items())
        print(f"  {name:7} {taken:7.3f} s {row['requests'] / taken:9.0f} requests/s   {told}")
    if "dynamo" in seconds:
        print(f"  kvist / dynamo: {seconds['dynamo'] / seconds['kvist']:.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="*")
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--profile", action="store_true", help="show where kvist's time goes, too")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", choices=CONTESTANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve)
    jobs = [(trace, router, arguments.workers) for trace in arguments.traces for router in ("round_robin", "kv")]
    rows = measure(jobs, arguments.reps)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))
    if arguments.profile:
        for job in jobs:
            profile = cProfile.Profile()
            profile.runcall(kvist, *job)
            print(f"\n{Path(job[0]).stem}, {job[1]}")
            pstats.Stats(profile).sort_stats("tottime").print_stats(20)
    return None


if __name__ == "__main__":
    main()
