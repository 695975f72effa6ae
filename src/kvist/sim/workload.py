"""Traces made by models of those who send requests: shared prefixes, sessions, agents that fork, popular documents.

All that is random comes from the seed, by PCG64, with a stream each for arrivals, lengths, choices and delays: the same
seed gives the same trace to the last bit, and another rate of arrivals the same prompts at other times. Times are
rounded to 1 us.

Prompts that have a beginning in common share whole trace blocks: the block in which they part is each one's own. What
an engine generated comes back in the prompt of the next turn as content that is new in the trace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvist.errors import InvalidInput
from kvist.sim.trace import MAX_TOKENS, MOONCAKE_BLOCK_SIZE, Floats, Ints, Trace, TraceBuilder

ARRIVALS: Final = ("poisson", "constant", "burst")
"""Ways to arrive: independent of each other; evenly; several at once, the bursts independent of each other."""

MAX_REQUESTS: Final = 10_000_000
"""Of a trace that is made here."""

MAX_BLOCKS: Final = 2**27
"""Of all its prompts together: 1 GiB."""


def _require(name: str, value: int, least: int, most: int = 2**31 - 1) -> None:
    if not least <= value <= most:
        raise InvalidInput(f"{name}: expected {least} to {most}, got {value}")


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When requests, or the first ones of sessions and trees, come. The first comes at 0.

    Attributes:
        rate: how many come in a second, on average.
        kind: one of `ARRIVALS`.
        burst: how many come at once, if they come in bursts.

    Raises:
        InvalidInput: one of these cannot be right.
    """

    rate: float = 1.0
    kind: str = "poisson"
    burst: int = 8

    def __post_init__(self) -> None:
        if not 1e-6 <= self.rate <= 1e6:
            raise InvalidInput(f"rate: expected 1e-06 to 1e+06 requests per second, got {self.rate}")
        if self.kind not in ARRIVALS:
            raise InvalidInput(f"arrivals: expected one of {', '.join(ARRIVALS)}, got {self.kind!r}")
        _require("burst", self.burst, 1)

    def times_ms(self, count: int, rng: np.random.Generator) -> Floats:
        """Times of `count` arrivals."""
        number = np.arange(count)
        if self.kind == "constant":
            return np.round(number * (1000 / self.rate), 3)
        at_once = self.burst if self.kind == "burst" else 1
        gaps = rng.exponential(1000 * at_once / self.rate, -(-count // at_once))
        return np.round(np.cumsum(gaps) - gaps[:1], 3)[number // at_once]


@dataclass(frozen=True, slots=True)
class Lengths:
    """How many tokens something has: log-normal, rounded, 1 or more.

    Attributes:
        mean: the mean, before rounding.
        sigma: standard deviation of the logarithm; 0: all are as long as the mean.

    Raises:
        InvalidInput: one of these cannot be right.
    """

    mean: int
    sigma: float = 0.0

    def __post_init__(self) -> None:
        _require("tokens", self.mean, 1, MAX_TOKENS)
        if not 0 <= self.sigma <= 3:
            raise InvalidInput(f"sigma: expected 0 to 3, got {self.sigma}")

    def draw(self, rng: np.random.Generator) -> int:
        """One length."""
        if not self.sigma:
            return self.mean
        wanted = self.mean * math.exp(self.sigma * rng.standard_normal() - self.sigma**2 / 2)
        return min(max(round(wanted), 1), MAX_TOKENS)


@dataclass(frozen=True, slots=True)
class _Context:
    """A list of tokens, by its trace blocks."""

    blocks: tuple[int, ...] = ()
    tokens: int = 0


class _Scribe:
    """Makes content, and writes requests into a trace."""

    def __init__(self, seed: int, block_size: int) -> None:
        _require("seed", seed, 0, 2**64 - 1)
        _require("block_size", block_size, 1)
        streams = (np.random.Generator(np.random.PCG64(one)) for one in np.random.SeedSequence(seed).spawn(4))
        self.arrivals, self.lengths, self.choices, self.delays = streams
        self.trace = TraceBuilder(block_size)
        self._contents = self._asked = 0

    def grow(self, context: _Context, tokens: int) -> _Context:
        """The context, continued with new content."""
        total = context.tokens + tokens
        wanted = -(-total // self.trace.block_size) - len(context.blocks)
        first, self._contents = self._contents, self._contents + wanted
        _require_fewer(self._contents)
        return _Context((*context.blocks, *range(first, first + wanted)), total)

    def fork(self, context: _Context, tokens: int) -> _Context:
        """The same, beside others that continue it: what it shares with them ends with the last full block."""
        whole = context.tokens // self.trace.block_size
        shared = _Context(context.blocks[:whole], whole * self.trace.block_size)
        return self.grow(shared, context.tokens - shared.tokens + tokens)

    def ask(
        self, prompt: _Context, output: int, arrival_ms: float | None, previous: int = -1, mean_delay_ms: float = 0.0
    ) -> int:
        """Write a request; what comes after another is delayed by a random time."""
        self._asked += len(prompt.blocks)
        _require_fewer(self._asked)
        delay = round(self.delays.exponential(mean_delay_ms), 3) if previous >= 0 else 0.0
        return self.trace.add(
            prompt.tokens, output, prompt.blocks, arrival_ms=arrival_ms, previous=previous, delay_ms=delay
        )


def shared_prefixes(
    *,
    requests: int = 1000,
    prompt: Lengths = Lengths(4096),
    output: Lengths = Lengths(256),
    shared_prefix_ratio: float = 0.5,
    prefix_groups: int = 1,
    arrivals: Arrivals = Arrivals(),
    block_size: int = MOONCAKE_BLOCK_SIZE,
    seed: int = 0,
) -> Trace:
    """Requests in groups; those of a group begin alike, and then each goes on by itself.

    Args:
        requests: how many.
        prompt: tokens of a prompt, its shared part included.
        output: tokens that are generated.
        shared_prefix_ratio: of the mean prompt, how much is shared; a prompt that is shorter is shared wholly.
        prefix_groups: how many groups; each request is of one at random.
        arrivals: when they come.
        block_size: tokens of a trace block.
        seed: of all that is random.

    Raises:
        InvalidInput: one of these cannot be right.
    """
    _require("requests", requests, 1, MAX_REQUESTS)
    _require("prefix_groups", prefix_groups, 1, MAX_REQUESTS)
    if not 0 <= shared_prefix_ratio <= 1:
        raise InvalidInput(f"shared_prefix_ratio: expected 0 to 1, got {shared_prefix_ratio}")
    scribe = _Scribe(seed, block_size)
    prefixes = [scribe.grow(_Context(), round(prompt.mean * shared_prefix_ratio)) for _ in range(prefix_groups)]
    for time in arrivals.times_ms(requests, scribe.arrivals).tolist():
        prefix = prefixes[scribe.choices.integers(prefix_groups)]
        tokens = prompt.draw(scribe.lengths)
        if tokens <= prefix.tokens:
            asked = _Context(prefix.blocks[: -(-tokens // block_size)], tokens)
        else:
            asked = scribe.fork(prefix, tokens - prefix.tokens)
        scribe.ask(asked, output.draw(scribe.lengths), time)
    return scribe.trace.build("shared-prefixes")


def sessions(
    *,
    count: int = 100,
    turns: int = 5,
    system_tokens: int = 512,
    message: Lengths = Lengths(512),
    output: Lengths = Lengths(256),
    mean_delay_ms: float = 10_000.0,
    arrivals: Arrivals = Arrivals(),
    block_size: int = MOONCAKE_BLOCK_SIZE,
    seed: int = 0,
) -> Trace:
    """Conversations: each prompt is all that was said before, and a new message.

    Args:
        count: how many conversations.
        turns: requests of each.
        system_tokens: with which all begin alike; 0: nothing.
        message: tokens that the user says in a turn.
        output: tokens that the engine answers; they are in the next prompt.
        mean_delay_ms: from an answer to the next turn, exponential.
        arrivals: when conversations begin.
        block_size: tokens of a trace block.
        seed: of all that is random.

    Raises:
        InvalidInput: one of these cannot be right.
    """
    _require("sessions", count, 1, MAX_REQUESTS)
    _require("turns", turns, 1, MAX_REQUESTS // count)
    scribe, system = _begin(seed, block_size, system_tokens, mean_delay_ms)
    for time in arrivals.times_ms(count, scribe.arrivals).tolist():
        said, row = scribe.fork(system, message.draw(scribe.lengths)), -1
        for turn in range(turns):
            answer = output.draw(scribe.lengths)
            row = scribe.ask(said, answer, None if turn else time, row, mean_delay_ms)
            said = scribe.grow(said, answer + message.draw(scribe.lengths))
    return scribe.trace.build("sessions")


def agent_trees(
    *,
    count: int = 50,
    depth: int = 3,
    forks: int = 3,
    system_tokens: int = 1024,
    message: Lengths = Lengths(1024),
    output: Lengths = Lengths(256),
    mean_delay_ms: float = 2_000.0,
    arrivals: Arrivals = Arrivals(),
    block_size: int = MOONCAKE_BLOCK_SIZE,
    seed: int = 0,
) -> Trace:
    """Agents that fork: when a request has ended, several others continue what it said, each with a tool's answer.

    Args:
        count: how many trees.
        depth: requests from the root to a leaf, both counted.
        forks: how many continue each request that is no leaf.
        system_tokens: with which all trees begin alike; 0: nothing.
        message: tokens that are new in a prompt: the task at the root, a tool's answer below.
        output: tokens that the engine answers; they are in the prompts below.
        mean_delay_ms: from an answer to the request that continues it, exponential.
        arrivals: when trees begin.
        block_size: tokens of a trace block.
        seed: of all that is random.

    Raises:
        InvalidInput: one of these cannot be right.
    """
    _require("trees", count, 1, MAX_REQUESTS)
    _require("depth", depth, 1, 1000)
    _require("forks", forks, 1, MAX_REQUESTS)
    if count * (depth if forks == 1 else (forks**depth - 1) // (forks - 1)) > MAX_REQUESTS:
        raise InvalidInput(f"forks: expected {MAX_REQUESTS} requests or fewer, got {count} trees of {forks}**{depth}")
    scribe, system = _begin(seed, block_size, system_tokens, mean_delay_ms)
    for time in arrivals.times_ms(count, scribe.arrivals).tolist():
        level = [(scribe.fork(system, message.draw(scribe.lengths)), -1)]
        for generation in range(depth):
            asked = [(said, output.draw(scribe.lengths), parent) for said, parent in level]
            rows = [
                scribe.ask(said, answer, None if generation else time, parent, mean_delay_ms)
                for said, answer, parent in asked
            ]
            ended = [(scribe.grow(said, answer), row) for (said, answer, _), row in zip(asked, rows, strict=True)]
            level = (
                [
                    ((scribe.fork if forks > 1 else scribe.grow)(said, message.draw(scribe.lengths)), row)
                    for said, row in ended
                    for _ in range(forks)
                ]
                if generation + 1 < depth
                else []
            )
    return scribe.trace.build("agent-trees")


def documents(
    *,
    requests: int = 1000,
    count: int = 100,
    skew: float = 1.0,
    document: Lengths = Lengths(8192),
    message: Lengths = Lengths(128),
    output: Lengths = Lengths(256),
    arrivals: Arrivals = Arrivals(),
    block_size: int = MOONCAKE_BLOCK_SIZE,
    seed: int = 0,
) -> Trace:
    """Questions about documents, of which some are asked about far more often: by Zipf's law.

    Args:
        requests: how many questions.
        count: how many documents.
        skew: the document of rank ``r`` is asked about in proportion to ``r ** -skew``; 0: all alike.
        document: tokens of one; they come first in the prompt.
        message: tokens of a question.
        output: tokens that are generated.
        arrivals: when questions come.
        block_size: tokens of a trace block.
        seed: of all that is random.

    Raises:
        InvalidInput: one of these cannot be right.
    """
    _require("requests", requests, 1, MAX_REQUESTS)
    _require("documents", count, 1, MAX_REQUESTS)
    if not 0 <= skew <= 10:
        raise InvalidInput(f"skew: expected 0 to 10, got {skew}")
    scribe = _Scribe(seed, block_size)
    texts = [scribe.grow(_Context(), document.draw(scribe.lengths)) for _ in range(count)]
    for time, rank in zip(
        arrivals.times_ms(requests, scribe.arrivals).tolist(),
        _zipf(requests, count, skew, scribe.choices).tolist(),
        strict=True,
    ):
        asked = scribe.fork(texts[rank], message.draw(scribe.lengths))
        scribe.ask(asked, output.draw(scribe.lengths), time)
    return scribe.trace.build("documents")


def _require_fewer(blocks: int) -> None:
    if blocks > MAX_BLOCKS:
        raise InvalidInput(f"a trace that is made must have at most {MAX_BLOCKS} blocks; got {blocks} or more")


def _begin(seed: int, block_size: int, system_tokens: int, mean_delay_ms: float) -> tuple[_Scribe, _Context]:
    _require("system_tokens", system_tokens, 0, MAX_TOKENS)
    if not 0 <= mean_delay_ms <= 1e9:
        raise InvalidInput(f"mean_delay_ms: expected 0 to 1e+09, got {mean_delay_ms}")
    scribe = _Scribe(seed, block_size)
    return scribe, scribe.grow(_Context(), system_tokens)


def _zipf(draws: int, ranks: int, skew: float, rng: np.random.Generator) -> Ints:
    """Ranks from 0, by the inverse of their cumulative weights."""
    upto = np.cumsum(np.arange(1.0, ranks + 1) ** -skew)
    found: Ints = np.searchsorted(upto, rng.random(draws) * upto[-1], side="right")
    return np.minimum(found, ranks - 1)
