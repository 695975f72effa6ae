"""The simulator beside a real vLLM server: the same requests, and how many tokens of each are found in the cache.

    python bench/fidelity.py [--requests 300] [--parts alone,waves-4,waves-8,queue,passes-40,free-4,free-8]
                             [--blocks 120] [--seats 8] [--seed 0] [--vllm PYTHON] [--directory DIR] [--json FILE]
                             [--record FILE]

A random model of 2.6 million parameters on the CPU, a pool that holds a few prompts only, and a trace of documents that
many share, conversations that grow and repeated prompts, in Mooncake's form. Every trace block is given tokens of its
own. Both sides begin each part with an empty cache.

* ``alone``: one request at a time.
* ``waves-K``: K requests queue while the engine is paused; the next K come when all of these have ended. Both sides
  then admit in the same order, whatever the machine's speed: chunked prefill, waiting, preemption and copies all show.
* ``queue``: all requests queue while the engine is paused; its seats and its pool decide who runs. Requests overlap as
  in ``free``, in an order that does not depend on time.
* ``passes-N``: N small random traces through vLLM's own scheduler and pool, without a model, in virtual time: every
  pass takes as long, so that times can be compared too. They differ after a pass in which somebody only computes
  generated tokens anew: it takes no time in Dynamo's replay, nor in ours. ``--record`` keeps cases and answers.
* ``free-K``: K at once, the next when one ends. Who ends first depends on the time that passes take; the simulator has
  the model that `kvist.sim.fit` makes of the server's log so far, so give ``alone`` or ``waves`` too.

The real cached tokens are those of ``usage.prompt_tokens_details``; evictions and preemptions are the server's own
events and counters. Every disagreement is printed with what came in another order before it. Ends with status 1 where
nothing did, or where less than 99 % agree in a part in which nothing but rules decides, which is all but ``free``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fidelity_server import BLOCK, BUDGET, LONGEST, Answer, Event, Server, alone, free, waves
from fidelity_traces import make_case, make_trace, prompts_of
from kvist.blocks.events import Stored
from kvist.sim.config import ClusterConfig, EngineConfig
from kvist.sim.fit import Fit, fit
from kvist.sim.observations import read_iterations
from kvist.sim.records import Records
from kvist.sim.replay import replay
from kvist.sim.timing import Linear, Timing
from kvist.sim.trace import Trace, read_trace, write_trace
from kvist.testing.models import make_shape
from kvist.testing.vllm import IN_PROCESS, OFFLINE

PARTS = ("alone", "waves-4", "waves-8", "queue", "passes-40", "free-4", "free-8")
HERE = Path(__file__).resolve().parent
WINDOW = 64
"""Begins and ends before a request whose order is looked at."""
WAVE_MS = 1e7
"""Between two waves in virtual time: more than any wave takes."""
Row = dict[str, Any]


# -- both ----------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """What all parts share."""

    trace: Trace
    server: Server
    blocks: int
    seats: int
    model: Fit | None = None

    def run(self, part: str) -> Row:
        """Both sides of one part, and what differs."""
        style, _, number = part.partition("-")
        if style == "queue":
            style, number = "waves", str(len(self.trace))
        width = int(number or 1)
        drive: Callable[..., list[Answer]] = {"alone": alone, "waves": waves, "free": free}[style]
        if style == "free" and self.model is None:
            self.model = fit(read_iterations(self.server.vllm.log.splitlines(), "the server's log"))
        server, trace = self.server, self.trace
        server.clear()
        before = {name: server.count(name) for name in ("num_preemptions", "prefix_cache_hits", "prefix_cache_queries")}
        started = time.perf_counter()
        answers = drive(server, prompts_of(trace), trace.output_tokens.tolist(), width)
        seconds = time.perf_counter() - started
        events = server.pool.take()
        counted = {name: server.count(name) - value for name, value in before.items()}
        records = self.simulate(style, width)
        real, simulated = np.array([each.cached for each in answers]), records.first_reused_input_tokens
        differing = np.flatnonzero(real != simulated).tolist()
        evicted = evictions(events)
        return {
            "part": part,
            "requests": len(trace),
            "agree": len(trace) - len(differing),
            "agree %": 100 * (1 - len(differing) / len(trace)),
            "prompt tokens": int(trace.input_tokens.sum()),
            "cached, vLLM": int(real.sum()),
            "cached, kvist": int(simulated.sum()),
            "blocks evicted, vLLM": evicted,
            "blocks evicted, kvist": records.evicted_blocks,
            "preemptions, vLLM": int(counted["num_preemptions"]),
            "preemptions, kvist": records.preemptions,
            "vLLM s": seconds,
            "simulated s": records.duration_ms / 1e3 if style == "free" else None,
            "server counters": counted,
            "disagreements": [explain(row, answers, records) for row in differing],
        }

    def simulate(self, style: str, width: int) -> Records:
        timing: Timing = Linear((0.0, 0.1, 5.0), (0.5, 0.001, 5.0))  # any will do where time decides nothing
        if style == "free" and self.model is not None:
            timing = Linear(self.model.prefill, self.model.decode, self.model.mixed_ms)
        engine = EngineConfig(
            num_blocks=self.blocks - 1,  # vLLM's block 0 is never used
            block_size=BLOCK,
            max_num_seqs=self.seats,
            max_num_batched_tokens=BUDGET,
            max_model_len=LONGEST,
            timing=timing,
        )
        if style != "waves":
            return replay(self.trace, engine, ClusterConfig(concurrency=width))
        arrival = np.arange(len(self.trace)) // width * WAVE_MS
        return replay(dataclasses.replace(self.trace, arrival_ms=arrival), engine)


def evictions(events: Sequence[Event]) -> int:
    """Contents that left the pool: vLLM tells each copy of a block, and the last one counts."""
    copies: Counter[int] = Counter()
    gone = 0
    for _, event in events:
        for block in event.hashes:
            if isinstance(event, Stored):
                copies[block] += 1
            else:
                copies[block] -= 1
                gone += copies[block] == 0
    return gone


def explain(row: int, answers: Sequence[Answer], records: Records) -> Row:
    """What is known of a disagreement: what happened in another order on the two sides before the request began."""
    sides = (
        ([answer.first for answer in answers], [answer.last for answer in answers]),
        (records.first_token_ms.tolist(), records.last_token_ms.tolist()),
    )
    orders: list[dict[str, int]] = []
    for first, last in sides:
        moments = [(at, f"{other} began") for other, at in enumerate(first)]
        moments += [(at, f"{other} ended") for other, at in enumerate(last)]
        orders.append({what: place for place, (_, what) in enumerate(sorted(moments))})
    real, simulated = orders
    begins = f"{row} began"
    before = [{what for what in order if order[what] < order[begins]} for order in orders]
    causes = [f"{what} before it on vLLM only" for what in sorted(before[0] - before[1], key=real.__getitem__)]
    causes += [f"{what} before it on kvist only" for what in sorted(before[1] - before[0], key=simulated.__getitem__)]
    last = sorted(before[0] & before[1], key=real.__getitem__)[-WINDOW:]
    swapped = [(a, b) for a, b in itertools.combinations(last, 2) if simulated[a] > simulated[b]]
    causes += [f"{a} before {b} on vLLM, after it on kvist" for a, b in reversed(swapped)]
    told = "; ".join(causes[:3]) or "UNEXPLAINED: both sides had begun and ended the same requests in the same order"
    told += f", and {len(causes) - 3} more" if len(causes) > 3 else ""
    found = {"vLLM": answers[row].cached, "kvist": int(records.first_reused_input_tokens[row])}
    return {"request": row, **found, "explained": bool(causes), "before it": told}


# -- vLLM's scheduler alone ------------------------------------------------------------------------------------------


def passes(count: int, first: int, model: Path, python: str, record: Path | None) -> Row:
    """Random cases through vLLM's scheduler and the simulator's."""
    cases = [make_case(first + number) for number in range(count)]
    asked = [dataclasses.asdict(case) for case in cases]
    started = time.perf_counter()
    ran = subprocess.run(
        [python, str(HERE / "fidelity_inside.py"), str(model)],
        env={**os.environ, **OFFLINE, **IN_PROCESS, "VLLM_PLUGINS": ""},
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        errors="replace",
    )
    if ran.returncode:
        raise RuntimeError(ran.stderr)
    seconds = time.perf_counter() - started
    answers: list[Row] = json.loads(ran.stdout)
    if record is not None:
        lines = ({**case, "answer": answer} for case, answer in zip(asked, answers, strict=True))
        record.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    total: Counter[str] = Counter()
    disagreements = []
    for number, (case, answer) in enumerate(zip(cases, answers, strict=True)):
        trace, engine = case.build()
        records = replay(trace, engine)
        cached = np.array(answer["first_reused_input_tokens"]), records.first_reused_input_tokens
        is_other = np.zeros(len(trace), dtype=bool)
        for name in ("first_admit_ms", "first_token_ms", "last_token_ms"):
            is_other |= np.abs(np.array(answer[name]) - getattr(records, name)) > 1e-3
        for row in np.flatnonzero(cached[0] != cached[1]).tolist():
            found = {"vLLM": int(cached[0][row]), "kvist": int(cached[1][row])}
            told = f"UNEXPLAINED: case {first + number}, {case.engine}"
            disagreements.append({"request": row, **found, "explained": False, "before it": told})
        total.update(
            {
                "requests": len(trace),
                "other times": int(is_other.sum()),
                "prompt tokens": int(trace.input_tokens.sum()),
                "cached, vLLM": int(cached[0].sum()),
                "cached, kvist": int(cached[1].sum()),
                "blocks evicted, vLLM": answer["evicted_blocks"],
                "blocks evicted, kvist": records.evicted_blocks,
                "preemptions, vLLM": sum(answer["readmission_count"]),
                "preemptions, kvist": records.preemptions,
            }
        )
    agree = total["requests"] - len(disagreements)
    row: Row = {"part": f"passes-{count}", **total, "agree": agree, "agree %": 100 * agree / total["requests"]}
    return row | {"vLLM s": seconds, "disagreements": disagreements}


# -- all of it -----------------------------------------------------------------------------------------------------


COLUMNS = ("part", "requests", "agree", "agree %", "prompt tokens", "cached, vLLM", "cached, kvist")
COLUMNS += ("blocks evicted, vLLM", "blocks evicted, kvist", "preemptions, vLLM", "preemptions, kvist", "other times")
COLUMNS += ("vLLM s", "simulated s")


def show(console: Console, rows: list[Row]) -> None:
    table = Table(*COLUMNS, title="requests that find as many tokens in the cache", title_justify="left")
    for row in rows:
        values = (row.get(key) for key in COLUMNS)
        table.add_row(*(f"{v:,.2f}" if isinstance(v, float) else "-" if v is None else str(v) for v in values))
    console.print(table)
    for row in rows:
        for each in row["disagreements"]:
            found = f"vLLM {each['vLLM']}, kvist {each['kvist']}"
            console.print(f"{row['part']}, request {each['request']}: {found}. {each['before it']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--blocks", type=int, default=120, help="of the pool, of 32 tokens; default: %(default)s")
    parser.add_argument("--seats", type=int, default=8, help="sequences that may run at once; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vllm", default=sys.executable, metavar="PYTHON", help="interpreter that has vLLM and kvist")
    parser.add_argument("--directory", type=Path, help="where model, trace and logs are kept; default: a temporary one")
    parser.add_argument("--record", type=Path, help="where cases and answers of passes-N are kept, a case a line")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    parts = args.parts.split(",")
    if unknown := [part for part in parts if not re.fullmatch(r"alone|queue|(waves|free|passes)-[1-9]\d*", part)]:
        parser.error(f"--parts: expected of {', '.join(PARTS)}, got {', '.join(unknown)}")
    if args.blocks <= LONGEST // BLOCK:
        parser.error(f"--blocks: expected more than the longest prompt's {LONGEST // BLOCK}, got {args.blocks}")
    console = Console(width=max(200, Console().width))
    with tempfile.TemporaryDirectory(prefix="kvist-fidelity-") as temporary:
        directory = args.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "fidelity.jsonl"
        write_trace(make_trace(args.requests, args.seed), path)
        model = make_shape(directory / "model", "tiny")
        rows: list[Row] = []
        bench = None
        with contextlib.ExitStack() as stack:
            for part in parts:
                if part.startswith("passes"):
                    row = passes(int(part.partition("-")[2]), args.seed, model, args.vllm, args.record)
                else:
                    if bench is None:
                        server = stack.enter_context(
                            Server(model, args.blocks, args.seats, directory.resolve(), args.vllm)
                        )
                        bench = Bench(read_trace(path), server, args.blocks, args.seats)
                    row = bench.run(part)
                rows.append(row)
                console.print(f"{part}: {row['agree']} of {row['requests']} agree, {row['vLLM s']:.0f} s")
        if bench is not None:
            (directory / "vllm.log").write_text(bench.server.vllm.log)
    show(console, rows)
    timing = bench.model.document() if bench is not None and bench.model is not None else None
    if timing is not None:
        console.print(f"time model of the free parts: {timing}")
    if args.json:
        document = {"arguments": {key: str(value) for key, value in vars(args).items()}, "parts": rows}
        args.json.write_text(json.dumps(document | {"timing": timing}, indent=1) + "\n")
    is_unexplained = any(not each["explained"] for row in rows for each in row["disagreements"])
    return int(is_unexplained or any(row["agree %"] < 99 for row in rows if not row["part"].startswith("free")))


if __name__ == "__main__":
    sys.exit(main())
