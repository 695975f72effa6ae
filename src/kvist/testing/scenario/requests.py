"""Requests that are interrupted by a snapshot, and what must come out when they go on. Floats are compared with ==.

Knows the routes of a live engine and what they answer. Must not know which engine it is, nor pytest.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from kvist.testing.answers import Completion, Step, Stream
from kvist.testing.live import LiveServer

SNAPSHOT: Final = "/v1/processfork/snapshot"
CHECKOUT: Final = "/v1/processfork/checkout"
FORK: Final = "/v1/processfork/fork"
SNAPSHOTS: Final = "/v1/processfork/snapshots"
STATS: Final = "/v1/processfork/stats"
COMPLETIONS: Final = "/v1/completions"

FIRST: Final = 50
"""Tokens that a request samples before it is snapshotted, at least."""
MORE: Final = 100
"""Tokens that its continuation samples."""
TOTAL: Final = 256
"""Tokens that a request samples: enough that a snapshot is most often done before ``TOTAL - MORE``."""

GREEDY: Final[dict[str, Any]] = {"temperature": 0.0, "ignore_eos": True}
SEEDED: Final[dict[str, Any]] = {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "seed": 1234, "ignore_eos": True}


def prompt(tokens: int, seed: int = 0) -> list[int]:
    """So many token ids that share no block with those of another seed or length."""
    generator = random.Random(f"{tokens}/{seed}")
    return [generator.randrange(7, 300) for _ in range(tokens)]


@dataclass(frozen=True)
class Case:
    """A request: its name is the client's for it."""

    name: str
    prompt: list[int]
    params: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def cases(lengths: Sequence[int], seed: int = 0) -> list[Case]:
    """Greedy and seeded requests with prompts of these lengths."""
    modes = (("greedy", GREEDY), ("seeded", SEEDED))
    return [
        Case(f"{mode}-{n}", prompt(n, seed + at), params) for n in lengths for at, (mode, params) in enumerate(modes)
    ]


@dataclass(frozen=True)
class Past:
    """What happened to a request before the server was killed.

    Attributes:
        case: the request.
        whole: all that it sampled: it went on while it was snapshotted.
        cid: the snapshot.
        sequence: its id there.
        tokens: prompt and sampled, at the snapshot.
        answer: of the snapshot call.
    """

    case: Case
    whole: Completion
    cid: str
    sequence: str
    tokens: int
    answer: dict[str, Any]

    @property
    def sampled(self) -> int:
        """Tokens that it had sampled at the snapshot."""
        return self.tokens - len(self.case.prompt)

    @property
    def token_ids(self) -> list[int]:
        """All ids at the snapshot."""
        return [*self.case.prompt, *self.whole.token_ids[: self.sampled]]

    @property
    def named(self) -> dict[str, str]:
        """What a request says in ``kv_transfer_params`` to continue it."""
        return {"snapshot": self.cid, "sequence": self.sequence}

    def next_steps(self, count: int = MORE) -> tuple[Step, ...]:
        """What the uninterrupted request sampled after the snapshot."""
        steps = self.whole.steps[self.sampled : self.sampled + count]
        assert len(steps) == count, f"snapshotted too late: {self.sampled} of {len(self.whole.steps)} were sampled"
        return steps


def interrupt(server: LiveServer, case: Case, *, first: int = FIRST, total: int = TOTAL) -> Past:
    """Run a request, snapshot it when it has sampled ``first`` tokens, and let it run on.

    Where the snapshot came so late that not even `MORE` tokens follow it, since a machine has other things to do, the
    request is run again, and longer.
    """
    while True:
        stream = server.stream(case.prompt, name=case.name, max_tokens=total, **case.params)
        stream.wait(first)
        past = finish(server, case, stream)
        if past.whole.finish_reason == "length":
            if past.sampled + MORE <= total:
                return past
            total *= 2
        elif past.sampled < len(past.whole.steps):  # it ended by itself, after the snapshot
            return past


def interrupt_twice(server: LiveServer, case: Case, *, total: int = TOTAL) -> tuple[Past, Past]:
    """As `interrupt`, with a second snapshot some time after the first."""
    while True:
        stream = server.stream(case.prompt, name=case.name, max_tokens=total, **case.params)
        stream.wait(FIRST)
        answer = server.post(SNAPSHOT, {"request_id": case.name})
        stream.wait(2 * FIRST + 40)
        second = finish(server, case, stream)
        if second.sampled + MORE <= total:
            return past_of(case, second.whole, answer), second
        total *= 2


def finish(server: LiveServer, case: Case, stream: Stream) -> Past:
    """Snapshot a running request now, and let it run on."""
    answer = server.post(SNAPSHOT, {"request_id": stream.id})
    return past_of(case, stream.result(), answer)


def past_of(case: Case, whole: Completion, answer: dict[str, Any]) -> Past:
    """A request that sampled ``whole``, and was snapshotted alone with this answer."""
    (sequence,) = answer["sequences"]
    assert sequence["cached_tokens"] == sequence["tokens"] - 1, "the KV of all tokens but the last one is stored"
    return Past(case, whole, answer["cid"], sequence["id"], sequence["tokens"], answer)


def baseline(server: LiveServer, case: Case, total: int = TOTAL, *, salted: bool = True) -> Completion:
    """The same request with nothing beside it; ``salted``: sharing no cache with any other."""
    salt = {"cache_salt": f"baseline {case.name}"} if salted else {}
    return server.complete(case.prompt, max_tokens=total, **case.params, **salt)


def go_on(server: LiveServer, past: Past, tokens: int = MORE, **changes: Any) -> Completion:
    """Continue a snapshot by name, with the request's own sampling parameters."""
    return server.resume(past.cid, past.sequence, **(past.case.params | {"max_tokens": tokens} | changes))


def check_out(server: LiveServer, past: Past, **options: Any) -> dict[str, Any]:
    """Check a snapshot out; the answer must say that all of it became reachable."""
    answer = server.post(CHECKOUT, {"cid": past.cid, **options})
    assert answer["ok"] is True
    assert answer["cid"] == past.cid
    assert answer["bit_exact"] is True, answer.get("differences")
    (sequence,) = answer["sequences"]
    assert (sequence["id"], sequence["tokens"]) == (past.sequence, past.tokens)
    assert answer["restored_tokens"] == sequence["cached_tokens"] == past.tokens - 1
    return answer


def assert_same(got: Sequence[Step], expected: Sequence[Step]) -> None:
    """Equal token ids and equal log probabilities, in every bit, at every step."""
    at = first_difference(got, expected)
    assert at is None or (at < len(got) and at < len(expected)), f"{len(got)} steps came, {len(expected)} were expected"
    assert at is None, f"step {at} of {len(expected)}: got {got[at]}, expected {expected[at]}"


def first_difference(got: Sequence[Step], expected: Sequence[Step]) -> int | None:
    """The first step that is not equal, or ``None``."""
    for at, (one, other) in enumerate(zip(got, expected, strict=False)):
        if one != other:
            return at
    return None if len(got) == len(expected) else min(len(got), len(expected))


def at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of calls that run at the same time."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


@contextmanager
def busy(server: LiveServer, requests: int = 4) -> Iterator[list[Stream]]:
    """Others that run meanwhile, each of another length, and must do so until the end. Needs room for 8192 tokens."""
    others = [
        server.stream(prompt(10 + 37 * n, seed=1000), max_tokens=7500, temperature=1.0, ignore_eos=True, logprobs=0)
        for n in range(requests)
    ]
    try:
        for other in others:
            other.wait(1)
        yield others
        ended = [other.result().finish_reason for other in others if not other.is_live]  # or says how it failed
        assert not ended, f"the others ended too early to prove anything: {ended}"
    finally:
        for other in others:
            other.close()


def error_of(answer: Any, status: int, code: str | None = None) -> str:
    """The message of an answer, which must be OpenAI's envelope with this status (and code)."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    if code is not None:
        assert error["code"] == code, error
    message: str = error["message"]
    assert message
    return message


def kept(answer: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(tokens, cached tokens) of each sequence of an answer."""
    return {seq["id"]: (seq["tokens"], seq["cached_tokens"]) for seq in answer["sequences"]}
