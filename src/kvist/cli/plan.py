"""`kvist plan`: the cheapest cluster that serves a trace within an SLA, with the replays that it rests on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import click
import numpy as np

from kvist.cli.invocation import Invocation, common
from kvist.cli.output import Cell, Line, Styled, Table
from kvist.cli.sim_options import LIMIT, TRACE, TRACE_BLOCK_SIZE, setups_of, several, with_settings, with_sla
from kvist.cli.sim_sweep import JOBS, RAY, runner
from kvist.cli.upkeep import FINDINGS
from kvist.errors import InvalidInput
from kvist.layout import DTYPE_BYTES
from kvist.sim import plan as planning
from kvist.sim.memory import KvShape, read_shape
from kvist.sim.plan import Plan, Prices, Target, Trial
from kvist.sim.report import PERCENTILES, Sla
from kvist.sim.timing import Timing
from kvist.sim.trace import read_trace

_PRICES: Final = Prices()
_MOST_GB: Final = 1e9
_AXES: Final = ("router", "policy", "host_blocks", "disk_blocks")
_GIVEN: Final = ("workers", "host_blocks", "disk_blocks", "native_host_blocks", "reject_oversized")


@click.command()
@TRACE
@TRACE_BLOCK_SIZE
@LIMIT
@click.option("--model", type=click.Path(path_type=Path), help="The model's config.json, for the bytes of a token.")
@click.option("--layers", type=int, help="Instead of --model: layers with a cache.")
@click.option("--kv-heads", type=int, help="KV heads of a layer.")
@click.option("--head-size", type=int, help="Elements of a head.")
@click.option("--kv-dtype", type=click.Choice(list(DTYPE_BYTES)), help="Of the cache.  [default: the model's, or bf16]")
@click.option("--kv-gb", type=float, help="Memory for KV of one GPU, 1e9 bytes; sets --num-blocks.")
@click.option("--gpus-per-worker", default=1, show_default=True, help="GPUs of one worker, or of each of its ranks.")
@click.option(
    "--host-gb",
    default="0",
    show_default=True,
    metavar="GB,...",
    callback=several(click.FLOAT),
    help="Host memory of a worker, or of each of its ranks.",
)
@click.option(
    "--disk-gb",
    default="0",
    show_default=True,
    metavar="GB,...",
    callback=several(click.FLOAT),
    help="Disk of a worker, or of each of its ranks.",
)
@click.option("--gpu-price", default=_PRICES.gpu_hour, show_default=True, help="Of a GPU for an hour.")
@click.option(
    "--host-price", default=_PRICES.host_gb_hour, show_default=True, help="Of 1e9 bytes of host memory for an hour."
)
@click.option("--disk-price", default=_PRICES.disk_gb_hour, show_default=True, help="Of 1e9 bytes of disk for an hour.")
@click.option("--max-workers", default=64, show_default=True, help="No cluster is larger.")
@with_sla
@click.option(
    "--percentile", default="p95", show_default=True, type=click.Choice(list(PERCENTILES)), help="Of the SLA."
)
@click.option(
    "--max-rejected", default=0.0, show_default=True, help="Part of the requests that may be rejected, below 1."
)
@with_settings("router", "policy", without=_GIVEN, defaults={"router": "round_robin,kv"})
@JOBS
@RAY
@click.pass_context
@common
def plan(
    run: Invocation,
    context: click.Context,
    trace: Path,
    trace_block_size: int | None,
    limit: int | None,
    model: Path | None,
    layers: int | None,
    kv_heads: int | None,
    head_size: int | None,
    kv_dtype: str | None,
    kv_gb: float | None,
    gpus_per_worker: int,
    host_gb: tuple[float, ...],
    disk_gb: tuple[float, ...],
    gpu_price: float,
    host_price: float,
    disk_price: float,
    max_workers: int,
    sla: Sla | None,
    percentile: str,
    max_rejected: float,
    settings: Mapping[str, Any],
    jobs: int,
    ray: str | None,
) -> None:
    """Find the cheapest cluster that serves a trace within an SLA.

    Router, policy, host memory and disk take several values with commas between; of every combination the least number
    of workers is sought, by halving. Exits with 3 if none meets the SLA. Prices are yours: those given are of no
    particular cloud.
    """
    target = Target(sla=sla or Sla(), percentile=percentile, rejected=max_rejected)
    prices = Prices(gpu_hour=gpu_price, host_gb_hour=host_price, disk_gb_hour=disk_price, gpus=gpus_per_worker)
    shape = _shape(model, layers, kv_heads, head_size, kv_dtype)
    sized = dict(settings) | {"reject_oversized": max_rejected > 0}
    if shape is not None:
        sized["kv_bytes_per_token"] = shape.bytes_per_token(gpus_per_worker)
    sized |= _blocks(sized, kv_gb, gpus_per_worker, host_gb, disk_gb)
    candidates = setups_of(sized, _AXES)
    requests = read_trace(trace, block_size=trace_block_size, limit=limit)
    with run.out.progress("replays") as progress, runner(requests, sla, jobs, ray, progress) as replay_all:
        found = planning.plan(candidates, target, prices, replay_all, max_workers=max_workers)
    answer = None if found.answer is None else _answer(found, found.answer, prices)
    document = {
        "trace": requests.name,
        "trace_file": {
            "path": str(trace),
            "block_size": requests.block_size,
            "limit": limit,
            "requests": len(requests),
        },
        "timing": _timing(candidates[0].engine.timing),
        "met": answer is not None,
        "sla": sla.limits if sla else {},
        "percentile": percentile,
        "max_rejected": max_rejected,
        "answer": answer,
        "closest": found.trials.index(found.closest),
        "runs": [_trial(target, trial) for trial in found.trials],
    }
    ids = [] if answer is None else [str(answer["gpus"])]
    run.out.result(document, ids=ids, text=_text(found, prices, requests.name))
    context.exit(0 if answer is not None else FINDINGS)


def _shape(
    model: Path | None, layers: int | None, kv_heads: int | None, head_size: int | None, dtype: str | None
) -> KvShape | None:
    by_hand = {"layers": layers, "kv_heads": kv_heads, "head_size": head_size}
    given = {name: value for name, value in by_hand.items() if value is not None}
    if model is not None:
        if given:
            raise InvalidInput(f"model tells of {', '.join(given)}: give one of them")
        return read_shape(model, dtype=dtype)
    if not given:
        return None
    if missing := by_hand.keys() - given.keys():
        raise InvalidInput(f"without a model, {', '.join(sorted(missing))} must be given, too; got {', '.join(given)}")
    return KvShape(
        layers=given["layers"], kv_heads=given["kv_heads"], head_size=given["head_size"], dtype=dtype or "bf16"
    )


def _blocks(
    settings: Mapping[str, Any], kv_gb: float | None, gpus: int, host_gb: tuple[float, ...], disk_gb: tuple[float, ...]
) -> dict[str, Any]:
    """Settings that are given in bytes, in blocks."""
    block_bytes = settings["kv_bytes_per_token"] * settings["block_size"]
    in_bytes = {"kv_gb": () if kv_gb is None else (kv_gb,), "host_gb": host_gb, "disk_gb": disk_gb}
    for name, sizes in in_bytes.items():
        for size in sizes:
            if not 0 <= size < _MOST_GB or (name == "kv_gb" and size == 0):
                least = "above 0" if name == "kv_gb" else "0 or more"
                raise InvalidInput(f"{name} must be a number, {least} and below {_MOST_GB:g}; got {size:g}")
            if size and block_bytes <= 0:
                raise InvalidInput(
                    f"{name} is in bytes: model, layers or kv_bytes_per_token must say what a token takes"
                )
            if name != "kv_gb" and 0 < size * 1e9 < block_bytes:
                raise InvalidInput(f"{name} must be 0 or hold a block, of {block_bytes:,} bytes; got {size:g}")
    blocks: dict[str, Any] = {
        "workers": 1,
        "native_host_blocks": 0,
        "host_blocks": tuple(int(gb * 1e9 // block_bytes) if gb else 0 for gb in host_gb),
        "disk_blocks": tuple(int(gb * 1e9 // block_bytes) if gb else 0 for gb in disk_gb),
    }
    return blocks if kv_gb is None else blocks | {"num_blocks": int(kv_gb * gpus * 1e9 // block_bytes)}


def _timing(timing: Timing) -> dict[str, Any]:
    """All its numbers: the settings of a run tell a table's shape alone."""
    values = {each.name: getattr(timing, each.name) for each in fields(timing)}  # type: ignore[arg-type]
    told = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}
    return {"kind": type(timing).__name__.lower()} | told


def _answer(found: Plan, answer: Trial, prices: Prices) -> dict[str, Any]:
    host, disk = planning.memory_gb(answer.setup)
    ranks = planning.ranks(answer.setup)
    confirmed = len(found.trials) - (1 if found.below is None else 2)
    return {
        "workers": answer.workers,
        "gpus": ranks * prices.gpus,
        "host_gb": host * ranks,
        "disk_gb": disk * ranks,
        "policy": answer.setup.engine.policy,
        "router": answer.setup.cluster.router,
        "cost_per_hour": answer.cost,
        "run": found.trials.index(answer),
        "confirmed_by": confirmed,
        "below_misses": None if found.below is None else confirmed + 1,
    }


def _trial(target: Target, trial: Trial) -> dict[str, Any]:
    return trial.setup.axes | {
        "cost_per_hour": trial.cost,
        "meets": trial.meets,
        "against_sla": target.figures(trial.figures),
        "settings": trial.setup.settings,
        "figures": trial.figures,
    }


def _text(found: Plan, prices: Prices, name: str) -> Iterator[Line | Table]:
    if found.answer is None:
        yield (Styled("no plan", "red"), f": no size of {name}'s candidates meets the SLA; the closest is")
        yield _described(found.closest, prices)
        yield from _limits(found.target, found.closest)
    else:
        yield (Styled("plan", "green"), f" for {name}:")
        yield _described(found.answer, prices)
        yield from _limits(found.target, found.answer)
        if found.below is not None:
            yield f"with {_count(found.below.workers, 'worker')}:"
            yield from _limits(found.target, found.below)
    yield ""
    last = "; the last confirm it" if found.answer is not None else ""
    yield f"it rests on these replays, seed {found.closest.setup.cluster.seed}{last}:"
    yield _table(found)


def _described(trial: Trial, prices: Prices) -> str:
    workers = trial.workers + trial.setup.cluster.prefill_workers
    ranks, size = planning.ranks(trial.setup), trial.setup.cluster.dp_size
    host, disk = (gb * ranks for gb in planning.memory_gb(trial.setup))
    of = f"{size} ranks, each of " if size > 1 else ""
    return (
        f"  {_count(ranks * prices.gpus, 'GPU')} ({_count(workers, 'worker')} of {of}"
        f"{trial.setup.engine.num_blocks:,} blocks), {host:,.0f} GB of host memory, {disk:,.0f} GB of disk, policy "
        f"{trial.setup.engine.policy}, router {trial.setup.cluster.router}: {trial.cost:,.2f} an hour"
    )


def _limits(target: Target, trial: Trial) -> Iterator[str]:
    for name, value in target.figures(trial.figures).items():
        limit = target.sla.limits[name]
        if value is None:
            yield f"  {target.percentile} {name.removesuffix('_ms')}: no request has one"
            continue
        verdict = "at most" if value <= limit else "misses"
        yield f"  {target.percentile} {name.removesuffix('_ms')} {value:,.1f} ms, {verdict} {limit:,.1f}"
    rejected = trial.figures["rejected_requests"]
    if rejected > target.rejected * trial.figures["num_requests"]:
        yield f"  rejected {rejected:,} of {trial.figures['num_requests']:,} requests, more than {target.rejected:.2%}"


def _table(found: Plan) -> Table:
    limits = list(found.target.sla.limits)
    titles = ("workers", "router", "policy", "host blocks", "disk blocks", "an hour")
    rows: list[tuple[Cell, ...]] = []
    for trial in found.trials:
        axes = trial.setup.axes
        cells: list[Cell] = [axes[title.replace(" ", "_")] for title in titles[:-1]]
        reuse = f"{trial.figures['prefix_cache_reused_ratio']:.2%}"
        against = found.target.figures(trial.figures)
        times = ("none" if (value := against[name]) is None else value for name in limits)
        rows.append((*cells, trial.cost, reuse, *times, "yes" if trial.meets else "no"))
    shown = (f"{found.target.percentile} {name.removesuffix('_ms')} ms" for name in limits)
    return Table((*titles, "from cache", *shown, "meets"), rows)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
