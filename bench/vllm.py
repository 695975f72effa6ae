"""kvist in vLLM: restore against prefill, what a snapshot costs, what an idle connector costs, and other connectors.

    python bench/vllm.py [--parts first-token,snapshot,idle,peers] [--tokens 500,1000,2000,4000,8000] [--repeat 3]
                         [--rounds 6] [--shape realistic] [--dtype auto] [--directory DIR] [--peers DIR] [--json FILE]

For the interpreter that has vLLM and kvist. A random model of 143 million parameters, eager; in bfloat16 where the CPU
has instructions for it, else in float32, which then is faster to prefill. Real servers on this machine, over HTTP.
Contestants take turns, so that a neighbour's noise falls on all of them; what is printed is the median of the
repetitions, and a ratio of two times the median of the ratios of each turn. Prompts are random and new unless a row
says otherwise. Files that are read lie in the operating system's page cache.
LMCache and thaw-vllm are asked if they can be imported, also from a directory (``pip install --target DIR``).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from asking import (  # noqa: E402
    CORES,
    Answer,
    Limits,
    Row,
    first_token,
    has_bfloat16,
    ids,
    median,
    only,
    ratio,
    read_all,
    show,
    wake,
)

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]  # this file is named vllm too
os.environ["PYTHONSAFEPATH"] = "1"

from rich.console import Console  # noqa: E402

from kvist.testing.answers import Stream  # noqa: E402
from kvist.testing.models import SHAPES, make_shape  # noqa: E402
from kvist.testing.vllm import IN_PROCESS, OFFLINE, VllmServer, transfer_config  # noqa: E402

PARTS = ("first-token", "snapshot", "idle", "peers")
BLOCK = 32
CHECKOUT, SNAPSHOT = "/v1/processfork/checkout", "/v1/processfork/snapshot"


@dataclass(frozen=True)
class Setup:
    """What all parts share."""

    shape: str
    model: Path
    dtype: str
    directory: Path
    tokens: list[int]
    repeat: int
    rounds: int
    peers: str | None

    @contextlib.contextmanager
    def servers(self, **transfers: dict[str, Any] | None) -> Iterator[dict[str, VllmServer]]:
        """A warm server for each KV transfer config; ``None``: one without connector."""
        batched = ("--max-num-batched-tokens", "8192")  # ExampleConnector stores only what the first step computes
        with contextlib.ExitStack() as stack:
            started = {}
            for name, transfer in transfers.items():
                options = () if transfer is None else ("--kv-transfer-config", json.dumps(transfer))
                env = {"VLLM_PLUGINS": "kvist" if (transfer or {}).get("kv_connector") == "KvistConnector" else ""}
                server = VllmServer(self.model, None, *batched, *options, dtype=self.dtype, block_size=BLOCK, env=env)
                stack.callback(server.kill)
                started[name] = server.wait()
            for server in started.values():
                for count in (40, 500, min(1000, max(self.tokens)), 40):
                    first_token(server, ids(count, random.random()))
            yield started


def snapshot_token(server: VllmServer, cid: str) -> Answer:
    return first_token(server, None, kv_transfer_params={"snapshot": cid})


def page_bytes(answer: Row) -> int:
    """Bytes of K and V of one block, from a snapshot of which nothing was stored before."""
    assert answer["pages_copied"] == answer["pages"], answer
    size: int = answer["new_bytes"] // answer["pages"]
    return size


# -- first token ---------------------------------------------------------------------------------------------------


def first_tokens(setup: Setup) -> dict[str, list[Row]]:
    """A server stores snapshots and is killed; fresh ones, a restore each in its own way, take turns."""
    store = setup.directory / "first-token"
    transfer = transfer_config(store.as_uri())
    arms = ("named", "checked out", "preloaded")
    held: dict[tuple[int, int], Row] = {}
    with setup.servers(kvist=transfer) as servers:
        server = servers["kvist"]
        for rep in range(setup.repeat):
            for tokens in setup.tokens:
                name = f"{tokens}-{rep}"
                first_token(server, ids(tokens, name), name)
                held[tokens, rep] = server.post(SNAPSHOT, {"request_id": name})
        first_token(server, ids(500, "warm"), "warm")
        warm = server.post(SNAPSHOT, {"request_id": "warm"})["cid"]
    read_all(store)
    some = held[max(setup.tokens), 0]
    limits = Limits(setup.directory, some["new_bytes"], page_bytes(some) // 2)
    rows, speeds = [], []
    runs: dict[int, dict[str, list[Any]]] = {tokens: {} for tokens in setup.tokens}
    with setup.servers(**dict.fromkeys(arms, transfer)) as servers:
        for server in servers.values():
            snapshot_token(server, warm)
        for rep in range(setup.repeat):
            for tokens in setup.tokens:
                fresh, cid = ids(tokens + 1, f"fresh-{rep}"), held[tokens, rep]["cid"]
                wake(servers["named"])
                got: dict[str, Any] = {"prefill": first_token(servers["named"], fresh)}
                got["hit"] = first_token(servers["named"], fresh[: tokens // BLOCK * BLOCK + 1])
                wake(servers["named"])
                got["named"] = snapshot_token(servers["named"], cid)
                wake(servers["checked out"])
                got["checkout ms"] = servers["checked out"].post(CHECKOUT, {"cid": cid})["total_ms"]
                got["checked out"] = snapshot_token(servers["checked out"], cid)
                wake(servers["preloaded"])
                ahead = servers["preloaded"].post(CHECKOUT, {"cid": cid, "preload": True})
                assert ahead["bit_exact"] and ahead["pages_loaded"] == ahead["pages"], ahead
                got["preload ms"] = ahead["total_ms"]
                got["preloaded"] = snapshot_token(servers["preloaded"], cid)
                nbytes = ahead["pages"] * page_bytes(some)
                got["memcpy s"], (_, got["get s"]) = limits.memcpy_s(nbytes), limits.store_s(nbytes)
                for key, value in got.items():
                    runs[tokens].setdefault(key, []).append(value)
                runs[tokens]["bytes"] = [nbytes]
    for tokens, run in runs.items():
        ms = {key: [answer.ms for answer in run[key]] for key in ("prefill", "hit", *arms)}
        row: Row = {"tokens": tokens, "prefill ms": median(ms["prefill"])}
        for key in (*arms, "hit"):
            row |= {f"{key} ms": median(ms[key]), f"{key} x": ratio(ms["prefill"], ms[key])}
        cached = {key: only([answer.cached for answer in run[key]]) for key in ms}
        row |= {"cached": " ".join(f"{count}" for count in cached.values()), "cached by": cached}
        rows.append(row)
        speed: Row = {"tokens": tokens, "MB": run["bytes"][0] / 1e6}
        speed |= {"checkout ms": median(run["checkout ms"]), "with preload ms": median(run["preload ms"])}
        for key in ("get", "memcpy"):
            speed[f"{key} GB/s"] = run["bytes"][0] / 1e9 / median(run[f"{key} s"])
        for key, limit in (("checked out", "get"), ("preloaded", "memcpy")):
            longer_s = (median(ms[key]) - median(ms["hit"])) / 1e3
            found = run["bytes"][0] / 1e9 / longer_s if longer_s > 0 else None  # lost in the noise
            speed[f"{key} GB/s"] = found
            speed[f"{key} / {limit}"] = None if found is None else found / speed[f"{limit} GB/s"]
        speeds.append(speed)
    return {
        "time to first token: prefill; restore by naming a snapshot (its pages verified within the request), after a "
        "checkout, after a checkout with preload; vLLM's own prefix cache, one token computed. x: times faster than "
        "prefill. cached: tokens not computed, prefill first": rows,
        "speed of the restore: bytes by what the first token took longer than with vLLM's prefix cache; beside a "
        "verified get from kvist.repo, and memcpy": speeds,
    }


# -- snapshot ------------------------------------------------------------------------------------------------------


class Times:
    """When the tokens of a stream came."""

    def __init__(self, stream: Stream) -> None:
        self.at: list[float] = []
        self._stream = stream
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        with contextlib.suppress(Exception):  # it ends
            while True:
                self._stream.wait(len(self.at) + 1)
                self.at.append(time.perf_counter())

    def longest_ms(self, since: float, until: float) -> float:
        """The longest time without a token that touches the span."""
        times = list(self.at)
        gaps = [b - a for a, b in itertools.pairwise(times) if b >= since and a <= until]
        return max(gaps, default=0.0) * 1e3


def snapshots(setup: Setup) -> dict[str, list[Row]]:
    """Snapshots of a request that generates meanwhile, and of one that has ended; beside the machine's own limits."""
    tokens = sorted(setup.tokens)[-2:][0]
    runs: dict[str, list[Row]] = {"live": [], "live, 50 tokens later": [], "ended": []}
    store = setup.directory / "snapshot"
    limits: Limits | None = None
    with setup.servers(kvist=transfer_config(store.as_uri())) as servers:
        server = servers["kvist"]
        for rep in range(-1, setup.repeat):  # the first is to warm up
            stream = server.stream(ids(tokens, f"live-{rep}"), name=f"live-{rep}", max_tokens=190, ignore_eos=True)
            times = Times(stream)
            taken = {}
            for what, least in (("live", 16), ("live, 50 tokens later", 50)):
                seen = len(times.at)
                stream.wait(seen + least)
                started = time.perf_counter()
                taken[what] = server.post(SNAPSHOT, {"request_id": f"live-{rep}"})
                ended = time.perf_counter()
                live = stream.is_live
                stream.wait(min(len(times.at) + 1, 190))
                quiet = [b - a for a, b in itertools.pairwise(times.at[1:]) if b < started or a > ended]
                taken[what] |= {"gap": times.longest_ms(started, ended), "quiet": max(quiet[-40:]) * 1e3, "live": live}
            stream.close()
            name = f"ended-{rep}"
            first_token(server, ids(tokens, name), name)
            taken["ended"] = server.post(SNAPSHOT, {"request_id": name})
            page = page_bytes(taken["ended"])
            limits = limits or Limits(setup.directory, taken["live"]["pages"] * page, page // 2)
            for what, answer in taken.items():
                nbytes = answer["pages_copied"] * page
                measured = {"bytes": nbytes, "memcpy s": limits.memcpy_s(nbytes), "put s": limits.store_s(nbytes)[0]}
                if rep >= 0:
                    runs[what].append(answer | measured)
    rows = []
    for what, run in runs.items():
        total_s = [one["total_ms"] / 1e3 for one in run]
        nbytes, pause_s = run[0]["bytes"], [one["pause_ms"] / 1e3 for one in run]
        row: Row = {"snapshot of": what, "tokens": only([one["tokens"] for one in run])}
        row |= {"pages": only([one["pages"] for one in run]), "copied": only([one["pages_copied"] for one in run])}
        row |= {"MB": nbytes / 1e6, "new MB": median([one["new_bytes"] / 1e6 for one in run])}
        row |= {"pause ms": median(pause_s) * 1e3, "pause GB/s": median([nbytes / 1e9 / s for s in pause_s])}
        row["memcpy GB/s"] = nbytes / 1e9 / median([one["memcpy s"] for one in run])
        row["pause / memcpy"] = ratio(pause_s, [one["memcpy s"] for one in run])
        row |= {"durable ms": median(total_s) * 1e3, "put ms": median([one["put s"] for one in run]) * 1e3}
        row["durable / put"] = ratio(total_s, [one["put s"] for one in run])
        if "gap" in run[0]:
            row["longest gap ms"] = median([one["gap"] for one in run])
            row["without ms"] = median([one["quiet"] for one in run])
            row["live after"] = all(one["live"] for one in run)
        rows.append(row)
    return {
        "snapshots: pause beside memcpy, time until durable beside a put of as many bytes on the same disk (both while "
        "the server is idle), longest time between two tokens during and without a snapshot": rows
    }


# -- idle connector ------------------------------------------------------------------------------------------------


class Inside:
    """A run of bench/vllm_inside.py."""

    def __init__(self, what: str, asked: dict[str, Any], plugins: str = "", path: str | None = None) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as this
        env = {**os.environ, **OFFLINE, **IN_PROCESS, "VLLM_PLUGINS": plugins}
        env |= {} if path is None else {"PYTHONPATH": path}
        command = [sys.executable, str(HERE / "vllm_inside.py"), what, json.dumps(asked)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._log, env=env, text=True)

    def ask(self, line: object | None = None) -> Row:
        assert self._process.stdin is not None and self._process.stdout is not None
        if line is not None:
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()
        got = self._process.stdout.readline()
        if not got:
            raise RuntimeError(self.log)
        row: Row = json.loads(got)
        return row

    @property
    def log(self) -> str:
        return os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0).decode(errors="replace")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


def idle(setup: Setup) -> dict[str, list[Row]]:
    """One workload, new prompts in each round, on engines that live side by side and work in turns."""
    return {
        f"throughput of 32 prompts of 200 tokens, 64 tokens each, model {shape}, {setup.rounds} rounds: overhead "
        "against no connector in the same round; 'none again' says what the measurement is worth; in the connector: "
        "of the engine's own time, what our calls took": idle_rows(setup, shape)
        for shape in dict.fromkeys(("tiny", setup.shape))
    }


def idle_rows(setup: Setup, shape: str) -> list[Row]:
    model = make_shape(setup.directory / f"idle-{shape}", shape, dtype=setup.dtype)
    url = (setup.directory / f"idle-{shape}-store").as_uri()
    written = transfer_config(url + "-written", {"mode": "write_through"})
    arms = {"none": None, "none again": None, "idle": transfer_config(url), "write_through": written}
    common = {
        "model": str(model),
        "dtype": setup.dtype,
        "block_size": BLOCK,
        "prompts": 32,
        "prompt": 200,
        "output": 64,
    }
    runs: dict[str, list[Row]] = {name: [] for name in arms}
    with contextlib.ExitStack() as stack:
        inside = {}
        for name, transfer in arms.items():
            inside[name] = Inside("arm", common | {"transfer": transfer}, "kvist" if transfer else "")
            stack.callback(inside[name].close)
            inside[name].ask()
        for turn in range(-1, setup.rounds):  # the first is to warm up
            order = list(arms)[turn % len(arms) :] + list(arms)[: turn % len(arms)]
            for name in order if turn % 2 else reversed(order):
                got = inside[name].ask(turn)
                if turn >= 0:
                    runs[name].append(got)
    rows = []
    plain = runs["none"]
    for name, run in runs.items():
        speeds = [one["tokens"] / one["seconds"] for one in run]
        costs = sorted(one["seconds"] / base["seconds"] - 1 for one, base in zip(run, plain, strict=True))
        cpu = [one["cpu_s"] / base["cpu_s"] - 1 for one, base in zip(run, plain, strict=True)]
        row: Row = {"connector": name, "tokens/s": median(speeds), "overhead %": median(costs) * 100}
        row |= {"least %": costs[0] * 100, "most %": costs[-1] * 100, "CPU time %": median(cpu) * 100}
        inside = [one["in_connector_s"] / one["seconds"] for one in run]
        row |= {"in the connector %": median(inside) * 100}
        row |= {"best tokens/s": max(speeds), "settled after ms": median([one["settle_s"] for one in run]) * 1e3}
        row |= {"blocks saved": run[-1].get("blocks_saved", 0), "dropped": run[-1].get("saves_dropped", 0)}
        rows.append(row)
    return rows


# -- peers ---------------------------------------------------------------------------------------------------------


def peers(setup: Setup) -> dict[str, list[Row]]:
    """Connectors that store what they see and find it by its tokens: one life saves, the next one loads."""
    folder, store = setup.directory / "example", setup.directory / "written"
    folder.mkdir()
    example = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    example["kv_connector_extra_config"] = {"shared_storage_path": str(folder)}  # type: ignore[assignment]
    written = transfer_config(store.as_uri(), {"mode": "write_through"})
    lives: list[dict[tuple[str, int], list[Answer]]] = []
    for life in ("save", "load"):
        runs: dict[tuple[str, int], list[Answer]] = {}
        with setup.servers(none=None, example=example, kvist=written) as servers:
            for rep in range(setup.repeat):
                for at, tokens in enumerate(setup.tokens):
                    names = list(servers)[(rep + at) % 3 :] + list(servers)[: (rep + at) % 3]
                    for name in names:
                        wake(servers[name])
                        got = first_token(servers[name], ids(tokens, f"peers-{rep}"))
                        runs.setdefault((name, tokens), []).append(got)
                        if name == "kvist" and life == "save":
                            settle(store)
        for place in (folder, store):
            read_all(place)
        lives.append(runs)
    rows = []
    for tokens in setup.tokens:
        save, load = ({name: run[name, tokens] for name in ("none", "example", "kvist")} for run in lives)
        ms = {("save", name): [one.ms for one in save[name]] for name in save}
        ms |= {("load", name): [one.ms for one in load[name]] for name in load}
        row: Row = {"tokens": tokens}
        for life in ("save", "load"):
            row[f"prefill, {life} ms"] = median(ms[life, "none"])
            for name in ("example", "kvist"):
                row[f"{name} {life} ms"] = median(ms[life, name])
                pair = ms[life, name], ms[life, "none"]
                row[f"{name} {life} x"] = ratio(*pair) if life == "save" else ratio(*pair[::-1])
        row["example / kvist"] = ratio(ms["load", "example"], ms["load", "kvist"])
        row["cached"] = " ".join(str(only([one.cached for one in load[name]])) for name in load)
        rows.append(row)
    return {
        "other connectors: time to first token without one, with vLLM's ExampleConnector, with kvist's write_through. "
        "save x: times as long as prefill; load x: times faster. cached: in this order": rows,
        "peers that may not run here": [probe(setup, "lmcache"), probe(setup, "thaw")],
    }


def settle(directory: Path) -> None:
    """Wait until nothing more is written in the background: it would fall on whoever is next."""
    last, since = -1, time.monotonic()
    while time.monotonic() - since < 1.5:
        time.sleep(0.1)
        size = sum(path.stat().st_size for path in list(directory.rglob("*.*")) if path.exists())
        if size != last:
            last, since = size, time.monotonic()


def probe(setup: Setup, name: str) -> Row:
    """What a peer says, or the error with which it refuses."""
    asked: Row = {
        "model": str(setup.model),
        "dtype": setup.dtype,
        "block_size": BLOCK,
        "tokens": [n for n in setup.tokens if n >= 500] or [500],
    }
    inside = Inside(name, asked, path=setup.peers)
    try:
        said, refused = inside.ask(), ""
    except RuntimeError as error:
        said, refused = {}, str(error)
    log = refused or inside.log
    inside.close()
    if said.get("rows"):
        return {"peer": name, "says": json.dumps(said["rows"])}
    raised = re.findall(r"^(?:\[rank\d+\]: )?((?:\w+\.)*\w*(?:Error|Exception): .+)$", log, re.MULTILINE)
    reason = raised[0 if said else -1] if raised else "its log says no reason"
    return {"peer": name, "says": f"does not run: {reason}"}


# -- all of it -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--tokens", default="500,1000,2000,4000,8000", help="lengths of prompts; default: %(default)s")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6, help="of the idle part")
    parser.add_argument("--shape", default="realistic", choices=sorted(SHAPES))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--directory", type=Path, default=Path.cwd(), help="on the disk to be measured; 10 GB")
    parser.add_argument("--peers", type=Path, help="directory with lmcache and thaw-vllm")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: expected of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    console = Console(width=max(180, Console().width))
    is_fast = has_bfloat16()
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if is_fast else "float32"
    console.print(f"{CORES} cores, {'with' if is_fast else 'without'} bfloat16 instructions; {args.shape}, {dtype}\n")
    result: dict[str, Any] = {
        "arguments": {key: str(value) for key, value in vars(args).items()},
        "cores": CORES,
        "dtype": dtype,
    }
    runners = {"first-token": first_tokens, "snapshot": snapshots, "idle": idle, "peers": peers}
    for part in parts:
        with tempfile.TemporaryDirectory(prefix="kvist-bench-", dir=args.directory.resolve()) as name:
            directory = Path(name)
            model = make_shape(directory / "model", args.shape, dtype=dtype)
            tokens = sorted({int(count) for count in args.tokens.split(",")})
            path = None if args.peers is None else str(args.peers.resolve())
            started = time.perf_counter()
            tables = runners[part](Setup(args.shape, model, dtype, directory, tokens, args.repeat, args.rounds, path))
        for title, rows in tables.items():
            show(console, title, rows)
        console.print(f"{part}: {time.perf_counter() - started:,.0f} s, load of the machine {os.getloadavg()[0]:.1f}\n")
        result[part] = {"tables": tables, "seconds": time.perf_counter() - started, "load": os.getloadavg()[0]}
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
