"""`kvist cartridge eval`: the same questions with no context, with the document, and with each cartridge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvist.cli.cartridge_options import read_text, with_model
from kvist.cli.invocation import Invocation, common
from kvist.cli.output import Line, Styled, Table
from kvist.errors import InvalidInput

if TYPE_CHECKING:
    from kvist.cartridge.cartridge import Cartridge
    from kvist.cartridge.evaluate import Report

WORSE = 3
"""Exit code: a cartridge does worse than no context."""


@click.command()
@click.argument("cartridges", nargs=-1, metavar="[CARTRIDGE]...")
@with_model
@click.option(
    "--questions",
    required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help='JSON lines of "question" and "answer".',
)
@click.option(
    "--match",
    default="contains",
    show_default=True,
    type=click.Choice(["contains", "exact"]),
    help="When an answer is right: the expected words are in it, or are all of it.",
)
@click.option("--answer-tokens", default=64, show_default=True, type=click.IntRange(1), help="Most of an answer.")
@click.option("--rows", default=8, show_default=True, type=click.IntRange(1), help="Questions asked at once.")
@click.option("--record", is_flag=True, help="Write the result into each cartridge's manifest.")
@common
def evaluate(
    run: Invocation,
    cartridges: tuple[str, ...],
    model: Path,
    text: Path,
    system: bool,
    device: str,
    dtype: str | None,
    questions: Path,
    match: str,
    answer_tokens: int,
    rows: int,
    record: bool,
) -> None:
    """Compare no context, the document, and CARTRIDGEs of it.

    Beside those given there is the lossless one and, for each that was trained, one of its length that was not: the
    document's first tokens. The exit code is 3 if one that is given does worse than no context.
    """
    from kvist.cartridge.cartridge import Cartridge
    from kvist.cartridge.causal import CausalModel
    from kvist.cartridge.evaluate import evaluate as judge
    from kvist.cartridge.evaluate import read_questions
    from kvist.cartridge.framing import Framing

    asked, document = read_questions(questions), read_text(text)
    opened = CausalModel.open(model, device=device, dtype=dtype)
    framing = Framing(opened.tokenizer, is_chat=system)
    given = {name: Cartridge.from_pretrained(name) for name in cartridges}
    for cartridge in given.values():
        cartridge.manifest.require(opened.identity)
        _require_framing(cartridge, system)
    names = _names(given)
    prefixes = _add_controls(opened.prefill(framing.document(document)), names)
    with run.out.progress("arms") as progress:
        report = judge(
            opened,
            framing,
            document,
            asked,
            cartridges=prefixes,
            matches="exact" if match == "exact" else "contains",
            most=answer_tokens,
            rows=rows,
            progress=progress,
        )
    if record:
        for name, cartridge in names.items():
            _record(cartridge, report, name)
    worse = [name for name in names if report.is_worse_than_none(name)]
    run.out.result(_document(report, names, worse), ids=worse, text=_text(report, names))
    if worse:
        click.get_current_context().exit(WORSE)


def _require_framing(cartridge: Cartridge, system: bool) -> None:
    """Refuse to ask after a cartridge in another way than it was made for."""
    prompt = cartridge.manifest.provenance.get("prompt")
    kind = prompt.get("kind") if isinstance(prompt, dict) else None
    if kind == ("text" if system else "system"):
        name = cartridge.manifest.cartridge_id
        what = {"text": "bare text", "system": "a system message"}[kind]
        raise InvalidInput(f"{name} was made of {what}", hint="ask " + ("without" if system else "with") + " --system")


def _names(given: dict[str, Cartridge]) -> dict[str, Cartridge]:
    """Cartridges by id; by what was typed where ids are not distinct."""
    ids = [cartridge.manifest.cartridge_id for cartridge in given.values()]
    if len(set(ids)) == len(ids):
        return dict(zip(ids, given.values(), strict=True))
    return given


def _add_controls(whole: Any, names: dict[str, Cartridge]) -> dict[str, Any]:
    """Prefixes by arm: the lossless one, those given, and of each trained one's length one that is not."""
    from kvist.cartridge.evaluate import LOSSLESS

    arms: dict[str, Any] = {LOSSLESS: whole}
    for name, cartridge in names.items():
        if cartridge.manifest.first_position != 0:
            raise InvalidInput(f"{name}: expected a cartridge from position 0, got {cartridge.manifest.first_position}")
        if name in arms:
            raise InvalidInput(f"{name!r} is the name of an arm, so no cartridge of that id can be judged beside it")
        arms[name] = [cartridge.layer(index) for index in range(cartridge.num_layers)]
        if cartridge.manifest.training_steps:
            tokens = cartridge.num_tokens
            arms[f"first {tokens} tokens, untrained"] = [(keys[:tokens], values[:tokens]) for keys, values in whole]
    return arms


def _record(cartridge: Cartridge, report: Report, name: str) -> None:
    if cartridge.directory is None:
        raise InvalidInput(f"{name}: only a cartridge in a directory can have its result written down")
    quality = {
        "arms": [arm.document() for arm in report.arms],
        "arm": name,
        "verdict": report.verdict(name),
    }
    provenance = {**cartridge.manifest.provenance, "quality": quality}
    cartridge.with_metadata(provenance=provenance).save_pretrained(cartridge.directory)


def _document(report: Report, names: dict[str, Cartridge], worse: Sequence[str]) -> dict[str, Any]:
    return {
        "arms": [arm.document() for arm in report.arms],
        "verdicts": {name: report.verdict(name) for name in names},
        "worse_than_no_context": list(worse),
        "answers": [
            {
                "question": question.question,
                "answer": question.answer,
                "said": {arm.name: arm.said[index].text for arm in report.arms},
            }
            for index, question in enumerate(report.questions)
        ],
    }


def _text(report: Report, names: dict[str, Cartridge]) -> Iterator[Line | Table]:
    rows: list[tuple[str | int | float, ...]] = [
        (
            arm.name,
            arm.tokens,
            f"{arm.right}/{len(arm.said)}",
            f"{arm.loss:.4f}",
            "" if arm.divergence is None else f"{arm.divergence:.4f}",
        )
        for arm in report.arms
    ]
    yield Table(("in front of the question", "tokens", "right", "loss", "divergence"), rows)
    if names:
        yield ""
    for name in names:
        colour = "red" if report.is_worse_than_none(name) else "green"
        yield (Styled(name, "yellow"), ": ", Styled(report.verdict(name), colour))
