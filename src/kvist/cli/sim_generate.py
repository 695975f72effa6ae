"""`kvist sim generate`: traces made by models of those who send requests, see `kvist.sim.workload`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from kvist.cli.invocation import Invocation, common
from kvist.cli.sim_options import output_option
from kvist.cli.sim_trace import told
from kvist.sim import workload
from kvist.sim.describe import describe
from kvist.sim.trace import Trace, write_trace
from kvist.sim.workload import ARRIVALS, Arrivals, Lengths


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the options that every kind takes came to.

    Attributes:
        run: the invocation.
        out: file to write.
        sigma: of all lengths.
        settings: arguments that every generator takes.
    """

    run: Invocation
    out: Path
    sigma: float
    settings: dict[str, Any]

    def lengths(self, tokens: int) -> Lengths:
        """Lengths with this mean."""
        return Lengths(tokens, self.sigma)

    def write(self, trace: Trace) -> None:
        """Write the trace, and tell what it holds."""
        write_trace(trace, self.out)
        found = describe(trace)
        document = {"file": str(self.out)} | found.to_json()
        self.run.out.result(document, ids=[str(self.out)], text=[*told(found), "", f"wrote {self.out}"])


def _number(name: str, default: int | float, what: str, least: int = 1) -> Callable[[Any], Any]:
    kind = click.FloatRange(0) if isinstance(default, float) else click.IntRange(least)
    return click.option(name, default=default, show_default=True, type=kind, help=what)


_OPTIONS: Final = (
    output_option("--out", "File to write; .gz or .zst packs it.", is_required=True),
    click.option("--arrivals", default="poisson", show_default=True, type=click.Choice(ARRIVALS), help="In which way."),
    _number("--rate", 1.0, "Arrivals a second."),
    _number("--burst", 8, "Arrivals at once, if they come in bursts."),
    _number("--output-tokens", 256, "Tokens to generate."),
    _number("--sigma", 0.0, "How uneven lengths are: standard deviation of their logarithm; 0: not at all."),
    _number("--trace-block-size", 512, "Tokens of a trace's block; others than kvist expect 512."),
    _number("--seed", 0, "Of all that is random.", 0),
)


def _asking(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that every kind takes; its first argument is what they came to."""

    def call(
        run: Invocation,
        /,
        out: Path,
        arrivals: str,
        rate: float,
        burst: int,
        output_tokens: int,
        sigma: float,
        trace_block_size: int,
        seed: int,
        **own: Any,
    ) -> None:
        settings = {
            "output": Lengths(output_tokens, sigma),
            "arrivals": Arrivals(rate, arrivals, burst),
            "block_size": trace_block_size,
            "seed": seed,
        }
        command(_Asked(run, out, sigma, settings), **own)

    functools.update_wrapper(call, command)
    made: Callable[..., None] = common(call)
    for option in reversed(_OPTIONS):
        made = option(made)
    return made


@click.group(short_help="Make a trace by a model of its users.")
def generate() -> None:
    """Make a trace by a model of its users. The same options give the same trace, to the last bit."""


@generate.command(short_help="Requests that begin alike.")
@_number("--requests", 1000, "How many.")
@_number("--input-tokens", 4096, "Tokens of a prompt, its shared beginning included.")
@_number("--shared-prefix-ratio", 0.5, "Of the mean prompt, how much is shared.")
@_number("--prefix-groups", 1, "Groups that share a beginning; each request is of one at random.")
@_asking
def prefixes(asked: _Asked, requests: int, input_tokens: int, shared_prefix_ratio: float, prefix_groups: int) -> None:
    """Requests that begin alike, and then each goes on by itself."""
    asked.write(
        workload.shared_prefixes(
            requests=requests,
            prompt=asked.lengths(input_tokens),
            shared_prefix_ratio=shared_prefix_ratio,
            prefix_groups=prefix_groups,
            **asked.settings,
        )
    )


@generate.command(short_help="Conversations.")
@_number("--sessions", 100, "How many conversations.")
@_number("--turns", 5, "Requests of each.")
@_number("--system-tokens", 512, "With which all prompts begin.", 0)
@_number("--message-tokens", 512, "What the user says in a turn.")
@_number("--delay-ms", 10_000.0, "From an answer to the next turn, on average.")
@_asking
def sessions(
    asked: _Asked, sessions: int, turns: int, system_tokens: int, message_tokens: int, delay_ms: float
) -> None:
    """Conversations: each prompt is all that was said before, and a new message."""
    asked.write(
        workload.sessions(
            count=sessions,
            turns=turns,
            system_tokens=system_tokens,
            message=asked.lengths(message_tokens),
            mean_delay_ms=delay_ms,
            **asked.settings,
        )
    )


@generate.command(short_help="Agents that fork.")
@_number("--trees", 50, "How many.")
@_number("--depth", 3, "Requests from the root to a leaf, both counted.")
@_number("--forks", 3, "How many continue each request that is no leaf.")
@_number("--system-tokens", 1024, "With which all prompts begin.", 0)
@_number("--message-tokens", 1024, "What is new in a prompt: the task, or a tool's answer.")
@_number("--delay-ms", 2_000.0, "From an answer to a request that continues it, on average.")
@_asking
def agents(
    asked: _Asked, trees: int, depth: int, forks: int, system_tokens: int, message_tokens: int, delay_ms: float
) -> None:
    """Agents that fork: several requests continue each one when it has ended."""
    asked.write(
        workload.agent_trees(
            count=trees,
            depth=depth,
            forks=forks,
            system_tokens=system_tokens,
            message=asked.lengths(message_tokens),
            mean_delay_ms=delay_ms,
            **asked.settings,
        )
    )


@generate.command(short_help="Questions about documents.")
@_number("--requests", 1000, "How many questions.")
@_number("--documents", 100, "How many documents.")
@_number("--skew", 1.0, "Exponent of Zipf's law for how often each is asked about; 0: all alike.")
@_number("--document-tokens", 8192, "Tokens of a document.")
@_number("--message-tokens", 128, "Tokens of a question.")
@_asking
def documents(
    asked: _Asked, requests: int, documents: int, skew: float, document_tokens: int, message_tokens: int
) -> None:
    """Questions about documents, of which some are asked about far more often."""
    asked.write(
        workload.documents(
            requests=requests,
            count=documents,
            skew=skew,
            document=asked.lengths(document_tokens),
            message=asked.lengths(message_tokens),
            **asked.settings,
        )
    )
