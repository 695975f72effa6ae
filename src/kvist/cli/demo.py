"""`kvist demo`: snapshot a session, kill the worker, check out in a new one, and go on bit for bit.

Everything is real: workers are `kvist serve` processes, spoken to over HTTP, and ended with SIGKILL.
"""

from __future__ import annotations

import base64
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click

from kvist.cli.invocation import Invocation, common
from kvist.cli.output import Table
from kvist.errors import EngineError, IntegrityError
from kvist.testing.worker import Worker

PROMPT_TOKENS: Final = 1000
FIRST_TOKENS: Final = 50
MORE_TOKENS: Final = 100
FORKS: Final = 12
NEIGHBOURS: Final = 8
OPTIONS: Final = ("--threads", "1")
"""Of every worker: a model this small gains nothing from more threads, and loses much on a busy machine."""
_VOCABULARY: Final = 512


@dataclass(frozen=True, slots=True)
class Case:
    """One way of generating, and what else the workers do meanwhile."""

    name: str
    sampling: dict[str, Any]
    neighbours: int

    def prompt(self) -> list[int]:
        """Ids that no other case shares a page with."""
        seed = sum(map(ord, self.name))
        return [3 + (seed * 7919 + i * i * 31 + i * 17) % (_VOCABULARY - 3) for i in range(PROMPT_TOKENS)]


CASES: Final = (
    Case("greedy", {"temperature": 0}, 0),
    Case("seeded", {"temperature": 0.8, "top_p": 0.95, "seed": 1234}, 0),
    Case("greedy, busy", {"temperature": 0}, NEIGHBOURS),
    Case("seeded, busy", {"temperature": 0.8, "top_p": 0.95, "seed": 4321}, NEIGHBOURS),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one case came to.

    Attributes:
        case: its name.
        bit_exact: token ids and logits of every line equal the uninterrupted run's, all bits.
        max_abs_logit_diff: the largest difference of any logit of any line.
        lines: continuations compared: the main line and the forks.
        tokens: tokens compared on each.
        restored_tokens: tokens of context that the checkout brought back.
        recomputed_tokens: tokens of context that the main line computed again.
        snapshot_ms, pause_ms: time until the snapshot was durable; for how much of it the engine stood still.
        checkout_ms: time until the snapshot was in the new worker.
        first_token_ms: time from the request to the first new token, after the checkout.
        reprefill_tokens, reprefill_first_token_ms: the same without a checkout.
        fork_storage_ratio: bytes in the store with the forks, over bytes without.
    """

    case: str
    bit_exact: bool
    max_abs_logit_diff: float
    lines: int
    tokens: int
    restored_tokens: int
    recomputed_tokens: int
    snapshot_ms: float
    pause_ms: float
    checkout_ms: float
    first_token_ms: float
    reprefill_tokens: int
    reprefill_first_token_ms: float
    fork_storage_ratio: float


@dataclass(slots=True)
class _Line:
    """A continuation: ids and, for each, the logits it was chosen from."""

    ids: list[int]
    logits: array[float]
    cached_tokens: int


@dataclass(slots=True)
class _Saved:
    """What outlives the killed worker."""

    cid: str
    sequence: str
    forks: list[str]
    ids: list[int]
    snapshot_ms: float
    pause_ms: float
    fork_storage_ratio: float


@click.command(short_help="See a cache snapshot, forked and checked out.")
@common
def demo(run: Invocation) -> None:
    """Make a tiny model, generate, snapshot, kill -9 the worker, check out in a new one, and go on.

    Each of 12 forks and the main line must continue with exactly the logits of a run that was never interrupted; the
    exit code is 20 if one bit differs. The repository is a temporary one; --store is not used.
    """
    with tempfile.TemporaryDirectory(prefix="kvist-demo-") as directory:
        outcomes = run_cases(Path(directory), CASES, lambda text: run.out.note(text))
    summary = {
        "bit_exact": all(outcome.bit_exact for outcome in outcomes),
        "max_abs_logit_diff": max(outcome.max_abs_logit_diff for outcome in outcomes),
        "restored_tokens": sum(outcome.restored_tokens for outcome in outcomes),
        "recomputed_tokens": sum(outcome.recomputed_tokens for outcome in outcomes),
        "snapshot_ms": max(outcome.snapshot_ms for outcome in outcomes),
        "checkout_ms": max(outcome.checkout_ms for outcome in outcomes),
        "fork_storage_ratio": max(outcome.fork_storage_ratio for outcome in outcomes),
    }
    run.out.result(
        {**summary, "cases": [asdict(outcome) for outcome in outcomes]},
        ids=[str(summary["bit_exact"]).lower()],
        text=["", *_table(outcomes), "", f"bit_exact: {str(summary['bit_exact']).lower()}"],
    )
    if not summary["bit_exact"]:
        raise IntegrityError(f"a continuation differs from the uninterrupted run by {summary['max_abs_logit_diff']}")


def _table(outcomes: Sequence[Outcome]) -> Iterator[Table]:
    rows: list[tuple[str, Callable[[Outcome], str]]] = [
        ("context, tokens", lambda o: str(PROMPT_TOKENS + FIRST_TOKENS)),
        ("snapshot, ms (engine paused)", lambda o: f"{o.snapshot_ms:.1f} ({o.pause_ms:.1f})"),
        (f"store with {FORKS} forks / without", lambda o: f"{o.fork_storage_ratio:.4f}"),
        ("checkout after kill -9, ms", lambda o: f"{o.checkout_ms:.1f}"),
        ("  restored / recomputed tokens", lambda o: f"{o.restored_tokens} / {o.recomputed_tokens}"),
        ("  first new token after, ms", lambda o: f"{o.first_token_ms:.1f}"),
        ("re-prefill instead", lambda o: ""),
        ("  restored / recomputed tokens", lambda o: f"0 / {o.reprefill_tokens}"),
        ("  first new token after, ms", lambda o: f"{o.reprefill_first_token_ms:.1f}"),
        ("lines x tokens compared", lambda o: f"{o.lines} x {o.tokens}"),
        ("largest logit difference", lambda o: f"{o.max_abs_logit_diff:g}"),
        ("bit exact", lambda o: "yes" if o.bit_exact else "NO"),
    ]
    yield Table(("", *(o.case for o in outcomes)), [(title, *(cell(o) for o in outcomes)) for title, cell in rows])


def run_cases(directory: Path, cases: Sequence[Case], say: Callable[[str], None]) -> list[Outcome]:
    """Run the whole story once for all cases, in one temporary directory."""
    from kvist.testing.models import make_model, make_tokenizer

    model = make_model(directory / "model", layers=2, hidden=128, heads=4, kv_heads=4, vocab=_VOCABULARY)
    make_tokenizer(model, vocab=_VOCABULARY)
    store = (directory / "store").as_uri()
    say("uninterrupted run: a worker generates what the others must equal")
    with Worker(model, store, *OPTIONS) as worker:
        expected = [_generate(worker, case, FIRST_TOKENS + MORE_TOKENS, prompt=case.prompt()) for case in cases]
    say(f"re-prefill: a fresh worker gets prompt and {FIRST_TOKENS} tokens again, and computes them again")
    with Worker(model, store, *OPTIONS) as worker:
        fresh = [_reprefill(worker, case, line.ids[:FIRST_TOKENS]) for case, line in zip(cases, expected, strict=True)]
    say(f"first worker: {FIRST_TOKENS} tokens, a snapshot, {FORKS} forks")
    worker = Worker(model, store, *OPTIONS).wait()
    try:
        saved = [_save(worker, case, directory / "store") for case in cases]
    finally:
        say(f"kill -9 {worker.pid}")
        worker.kill()
    say(f"second worker: checkout, then {MORE_TOKENS} tokens on the main line and every fork")
    with Worker(model, store, *OPTIONS) as worker:
        return [_continue(worker, *of_case) for of_case in zip(cases, saved, expected, fresh, strict=True)]


def _reprefill(worker: Worker, case: Case, ids: list[int]) -> tuple[int, float]:
    """Tokens of context that are computed again without a checkout, and milliseconds to the first new token."""
    with _neighbours(worker, case.neighbours):
        started = time.perf_counter()
        line = _generate(worker, case, 1, prompt=case.prompt() + ids)
        return PROMPT_TOKENS + FIRST_TOKENS - 1 - line.cached_tokens, (time.perf_counter() - started) * 1000


def _save(worker: Worker, case: Case, store: Path) -> _Saved:
    with _neighbours(worker, case.neighbours):
        body = {"prompt": case.prompt(), "max_tokens": FIRST_TOKENS, "ignore_eos": True, "return_token_ids": True}
        answer = worker.post("/v1/completions", {"model": "model", **body, **case.sampling})
        snapshot = worker.post("/v1/processfork/snapshot", {"request_id": answer["id"]})
        before = _bytes_below(store)
        forks = worker.post("/v1/processfork/fork", {"cid": snapshot["cid"], "n": FORKS})["cids"]
    return _Saved(
        cid=snapshot["cid"],
        sequence=snapshot["sequences"][0]["id"],
        forks=forks,
        ids=answer["choices"][0]["token_ids"],
        snapshot_ms=snapshot["total_ms"],
        pause_ms=snapshot["pause_ms"],
        fork_storage_ratio=_bytes_below(store) / before,
    )


def _continue(worker: Worker, case: Case, saved: _Saved, expected: _Line, fresh: tuple[int, float]) -> Outcome:
    with _neighbours(worker, case.neighbours):
        checkout = worker.post("/v1/processfork/checkout", {"cid": saved.cid})
        started = time.perf_counter()
        main = _generate(worker, case, 1, snapshot=saved.cid, sequence=saved.sequence)
        first_token_ms = (time.perf_counter() - started) * 1000
        for fork in saved.forks:
            worker.post("/v1/processfork/checkout", {"cid": fork})
        with ThreadPoolExecutor(1 + FORKS) as pool:
            lines = list(
                pool.map(
                    lambda cid: _generate(worker, case, MORE_TOKENS, snapshot=cid, sequence=saved.sequence),
                    [saved.cid, *saved.forks],
                )
            )
    wanted_ids = expected.ids[FIRST_TOKENS:]
    wanted_logits = expected.logits[FIRST_TOKENS * _VOCABULARY :]
    exact = saved.ids == expected.ids[:FIRST_TOKENS] and all(
        line.ids == wanted_ids and line.logits.tobytes() == wanted_logits.tobytes() for line in lines
    )
    return Outcome(
        case=case.name,
        bit_exact=exact,
        max_abs_logit_diff=max(_distance(line.logits, wanted_logits) for line in lines),
        lines=len(lines),
        tokens=MORE_TOKENS,
        restored_tokens=checkout["restored_tokens"],
        recomputed_tokens=PROMPT_TOKENS + FIRST_TOKENS - 1 - main.cached_tokens,
        snapshot_ms=saved.snapshot_ms,
        pause_ms=saved.pause_ms,
        checkout_ms=checkout["total_ms"],
        first_token_ms=first_token_ms,
        reprefill_tokens=fresh[0],
        reprefill_first_token_ms=fresh[1],
        fork_storage_ratio=saved.fork_storage_ratio,
    )


def _generate(
    worker: Worker,
    case: Case,
    tokens: int,
    *,
    prompt: list[int] | None = None,
    snapshot: str | None = None,
    sequence: str | None = None,
) -> _Line:
    body: dict[str, Any] = {"model": "model", "max_tokens": tokens, "ignore_eos": True, "return_token_ids": True}
    if snapshot is None:
        body |= {"prompt": prompt, **case.sampling}
    else:
        body["kv_transfer_params"] = {"snapshot": snapshot, "sequence": sequence}
    answer = worker.post("/v1/completions", body | {"kvist": {"logits": True}})
    choice = answer["choices"][0]
    logits = array("f", base64.b64decode(choice["kvist"]["logits"]))
    if len(choice["token_ids"]) != tokens or len(logits) != tokens * _VOCABULARY:
        raise EngineError(f"expected {tokens} tokens with their logits, got {len(choice['token_ids'])}")
    return _Line(choice["token_ids"], logits, answer["usage"]["prompt_tokens_details"]["cached_tokens"])


@contextmanager
def _neighbours(worker: Worker, count: int) -> Iterator[None]:
    """Other sequences that the worker generates meanwhile; each has begun before the block does."""
    over = threading.Event()
    begun = threading.Semaphore(0)

    def stream(number: int) -> None:
        body = {"model": "model", "prompt": [5 + number] * (20 + number), "max_tokens": 4000, "ignore_eos": True}
        body |= {"stream": True, "temperature": 1.0, "seed": number}
        with worker.http.stream("POST", "/v1/completions", json=body) as answer:
            for i, _ in enumerate(answer.iter_lines()):
                if i == 0:
                    begun.release()
                if over.is_set():
                    return

    with ThreadPoolExecutor(max(1, count)) as pool:
        streams = [pool.submit(stream, number) for number in range(count)]
        for _ in streams:
            begun.acquire()
        try:
            yield
        finally:
            over.set()
        for one in streams:
            one.result()


def _distance(a: array[float], b: array[float]) -> float:
    """The largest difference, 0 where all bits are equal."""
    return 0.0 if a.tobytes() == b.tobytes() else max(abs(x - y) for x, y in zip(a, b, strict=True))


def _bytes_below(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
