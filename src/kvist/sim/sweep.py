"""Many replays of one trace: in this process, in several of this machine, or on a Ray cluster; the rows are the same.

A row depends on the trace and its setup alone, so where it was made cannot be told from it.
"""

from __future__ import annotations

import csv
import importlib
import io
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import msgspec
import numpy as np

from kvist.errors import InvalidInput, KvistError
from kvist.sim.config import ClusterConfig, EngineConfig
from kvist.sim.processes import Progress, told, workers
from kvist.sim.replay import replay
from kvist.sim.report import Report, Sla
from kvist.sim.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a trace is replayed on."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    @property
    def settings(self) -> dict[str, Any]:
        """All of it, by field, for JSON; `axes` are part of it."""
        return {"engine": _plain(self.engine), "cluster": _plain(self.cluster)}

    @property
    def axes(self) -> dict[str, Any]:
        """What sweeps and plans vary."""
        tiers = self.engine.tiers
        return {
            "workers": self.cluster.workers,
            "router": self.cluster.router,
            "policy": self.engine.policy,
            "num_blocks": self.engine.num_blocks,
            "host_blocks": tiers.host.capacity if tiers else 0,
            "disk_blocks": tiers.disk.capacity if tiers and tiers.disk else 0,
        }


@dataclass(frozen=True, slots=True)
class Row:
    """One replay of a sweep.

    Attributes:
        setup: what the trace was replayed on.
        figures: of `Report.figures`.
    """

    setup: Setup
    figures: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """For JSON."""
        return self.setup.axes | {"settings": self.setup.settings, "figures": self.figures}


Runner = Callable[[Sequence[Setup]], list[Row]]
"""Replays one trace on each of the setups, and gives their rows in the same order."""


def simulate(trace: Trace, setup: Setup, sla: Sla | None = None) -> Row:
    """One replay: the task that a process or a node is given."""
    records = replay(trace, setup.engine, setup.cluster)
    return Row(setup, Report(trace.name, setup.engine, setup.cluster, records, 0.0, sla).figures())


@contextmanager
def local(trace: Trace, *, sla: Sla | None = None, jobs: int = 1, progress: Progress | None = None) -> Iterator[Runner]:
    """Replays in so many processes of this machine; 1: in this one.

    Raises:
        InvalidInput: less than 1 process.
        EngineError: from the runner: a process ended by itself.
    """
    if jobs < 1:
        raise InvalidInput(f"jobs must be 1 or more; got {jobs}")
    if jobs == 1:
        yield lambda setups: told((simulate(trace, setup, sla) for setup in setups), len(setups), progress)
        return
    with workers(jobs, _keep, (trace, sla), progress) as do:
        yield lambda setups: do(_simulate_kept, setups)


@contextmanager
def on_ray(trace: Trace, address: str, *, sla: Sla | None = None, progress: Progress | None = None) -> Iterator[Runner]:
    """Replays on a Ray cluster, whose nodes have kvist installed.

    Args:
        trace: it is sent to each node once.
        address: of the cluster, as Ray has it; ``"local"`` starts one on this machine, ``"auto"`` finds one.
        sla: as of `simulate`.
        progress: told how many replays are done.

    Raises:
        InvalidInput: the Python package ``ray`` is not installed.
        KvistError: there is no cluster at the address.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ModuleNotFoundError:
        raise InvalidInput("--ray needs the Python package ray", hint="pip install 'kvist[ray]'") from None
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, ValueError) as error:
        raise KvistError(f"no Ray cluster at {address}: {error}") from error
    try:
        task, held, limits = ray.remote(simulate), ray.put(trace), ray.put(sla)

        def run(setups: Sequence[Setup]) -> list[Row]:
            started = [task.remote(held, setup, limits) for setup in setups]
            return told((_get(one) for one in started), len(started), progress)

        def _get(one: Any) -> Row:
            try:
                row: Row = ray.get(one)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            return row

        yield run
    finally:
        ray.shutdown()


def grid(axes: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values of the axes, the last axis fastest.

    Raises:
        InvalidInput: an axis without a value, or with one twice.
    """
    for name, values in axes.items():
        if not values or len(set(values)) < len(values):
            raise InvalidInput(f"{name} must be one or more values, all different; got {list(values)}")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def to_csv(rows: Sequence[Row]) -> str:
    """A line of axes and figures for each row, below their names."""
    text = io.StringIO()
    lines = [row.setup.axes | row.figures for row in rows]
    writer = csv.DictWriter(text, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


_kept: tuple[Trace, Sla | None]


def _keep(trace: Trace, sla: Sla | None) -> None:
    """In a process of the pool: the trace comes once, not with every setup."""
    global _kept
    _kept = trace, sla


def _simulate_kept(setup: Setup) -> Row:
    return simulate(_kept[0], setup, _kept[1])


def _plain(value: Any) -> Any:
    """A config for JSON: by field; an array by its shape, and what is not finite by its name."""
    if isinstance(value, msgspec.Struct):
        return {name: _plain(each) for name, each in msgspec.structs.asdict(value).items()}
    if is_dataclass(value):
        name = type(value).__name__
        kind = {} if name.endswith("Config") else {"kind": name.lower()}  # a time model is one of several
        return kind | {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, np.ndarray):
        return {"shape": list(value.shape)}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
