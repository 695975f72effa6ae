"""Requests that are interrupted by a snapshot, and what must come out when they go on. Floats are compared with ==."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from kvist.repo import Manifest, Repository
from kvist.testing.answers import Completion, Step, Stream
from kvist.testing.vllm import VllmServer

SNAPSHOT = "/v1/processfork/snapshot"
CHECKOUT = "/v1/processfork/checkout"
FORK = "/v1/processfork/fork"
SNAPSHOTS = "/v1/processfork/snapshots"
STATS = "/v1/processfork/stats"

FIRST = 50
"""Tokens that a request samples before it is snapshotted, at least."""
MORE = 100
"""Tokens that its continuation samples."""
TOTAL = 256
"""Tokens that a request samples if nobody stops it: enough that a snapshot is long done before ``TOTAL - MORE``."""

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
SEEDED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "seed": 1234, "ignore_eos": True}


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
        return self.tokens - len(self.case.prompt)

    @property
    def token_ids(self) -> list[int]:
        """All ids at the snapshot."""
        return [*self.case.prompt, *self.whole.token_ids[: self.sampled]]

    def next_steps(self, count: int = MORE) -> tuple[Step, ...]:
        """What the uninterrupted request sampled after the snapshot."""
        steps = self.whole.steps[self.sampled : self.sampled + count]
        assert len(steps) == count, f"snapshotted too late: {self.sampled} of {len(self.whole.steps)} were sampled"
        return steps


def interrupt(server: VllmServer, case: Case, *, first: int = FIRST, total: int = TOTAL) -> Past:
    """Run a request, snapshot it when it has sampled ``first`` tokens, and let it run on."""
    stream = server.stream(case.prompt, name=case.name, max_tokens=total, **case.params)
    stream.wait(first)
    return finish(server, case, stream)


def finish(server: VllmServer, case: Case, stream: Stream) -> Past:
    """Snapshot a running request now, and let it run on."""
    assert stream.is_live
    answer = server.post(SNAPSHOT, {"request_id": stream.id})
    whole = stream.result()
    (sequence,) = answer["sequences"]
    past = Past(case, whole, answer["cid"], sequence["id"], sequence["tokens"], answer)
    assert 0 < past.sampled < len(whole.steps), "the request was snapshotted while it ran"
    assert sequence["cached_tokens"] == past.tokens - 1
    return past


def baseline(server: VllmServer, case: Case, total: int = TOTAL) -> Completion:
    """The same request with nothing beside it, sharing no cache with any other."""
    return server.complete(case.prompt, cache_salt=f"baseline {case.name}", max_tokens=total, **case.params)


def go_on(server: VllmServer, past: Past, tokens: int = MORE, **changes: Any) -> Completion:
    """Continue a snapshot by name, with the request's own sampling parameters."""
    return server.resume(past.cid, past.sequence, **(past.case.params | {"max_tokens": tokens} | changes))


def check_out(server: VllmServer, past: Past, **options: Any) -> dict[str, Any]:
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
def busy(server: VllmServer, requests: int = 4) -> Iterator[list[Stream]]:
    """Others that run meanwhile, each of another length, and must do so until the end. Needs ``max_model_len`` 8192."""
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


# -- the store, behind the server's back ------------------------------------------------------------------------------


def root_of(store: str) -> Path:
    """The directory of a store's url."""
    return Path(unquote(urlsplit(store).path))


def manifests_of(store: str, cid: str) -> list[Manifest]:
    """The manifests of a snapshot."""
    with Repository.open(store) as repo:
        return [repo.manifest(manifest) for manifest in repo.snapshot(cid).manifests]


def flip_a_bit(store: str, cid: str, *, page: int = -1, at: int = 5) -> None:
    """Flip one bit in a stored page of a snapshot's only sequence, wherever it is stored."""
    with Repository.open(store) as repo:
        manifest = repo.manifest(repo.snapshot(cid).manifests[0])
        entries = {entry.ix: entry for entry in manifest.pages}
        digest = entries[manifest.sequences[0].page_ixs[page]].v
        data = repo.pages.get(digest)
        homes = repo.pages.homes(digest)
    assert homes
    for key in homes:
        path = root_of(store) / key
        raw = bytearray(path.read_bytes())
        place = raw.find(data)
        assert place >= 0
        raw[place + at] ^= 0x10
        path.chmod(0o644)
        path.write_bytes(raw)


def altered(store: str, cid: str, **changes: Any) -> str:
    """Commit a snapshot that differs in its layout (and fits nothing that runs), and give its cid."""
    with Repository.open(store) as repo:
        made = []
        for cid_of_one in repo.snapshot(cid).manifests:
            old = repo.manifest(cid_of_one)
            layout = replace(old.layout, **changes)
            sequences = tuple(_fitting(seq, layout.page_size_tokens) for seq in old.sequences)
            made.append(replace(old, layout=layout, sequences=sequences))
        return repo.commit(made).cid


def _fitting(seq: Any, page_size_tokens: int) -> Any:
    return replace(seq, fill_in_last_page=seq.fill_in_last_page % page_size_tokens)


def kept(answer: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(tokens, cached tokens) of each sequence of an answer."""
    return {seq["id"]: (seq["tokens"], seq["cached_tokens"]) for seq in answer["sequences"]}
