"""`kvist cartridge validate`: tries the cartridges of a running server, tier by tier."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from kvist.cli.invocation import Invocation, common
from kvist.cli.output import Table
from kvist.cli.upkeep import FINDINGS
from kvist.errors import InvalidInput

if TYPE_CHECKING:
    from kvist.cli.cartridge_tiers import Asker, Prompt, Question

_F = TypeVar("_F", bound=Callable[..., Any])

_TIMEOUT_S: Final = 600.0


def _pairs(context: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[str, Path], ...]:
    """``ID=PATH``, of something that is there."""
    found = []
    for value in values:
        name, sign, path = value.partition("=")
        if not (name and sign and path):
            raise click.BadParameter(f"expected ID=PATH, got {value!r}", context, param)
        if not Path(path).exists():
            raise click.BadParameter(f"{path} is not there", context, param)
        found.append((name, Path(path)))
    return tuple(found)


def _paths(name: str, plural: str, text: str) -> Callable[[_F], _F]:
    return click.option(name, plural, multiple=True, metavar="ID=PATH", callback=_pairs, help=text)


@click.command()
@click.option("--url", required=True, help="Of the server: vLLM with kvist, or kvist serve.")
@click.option("--api-key", envvar="OPENAI_API_KEY", help="What the server asks for.  [env: OPENAI_API_KEY]")
@click.option("--model", metavar="NAME", help="What the server calls its model.  [default: its first]")
@click.option("--id", "ids", multiple=True, metavar="ID", help="Cartridge to try; may be repeated.  [default: all]")
@_paths("--cartridge", "cartridges", "A cartridge's files: the token ids of its document.")
@_paths("--document", "documents", "The text that a cartridge was made of.")
@click.option(
    "--questions",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help='JSON lines {"question", "answer", "cartridge"?}; an answer must be contained in the reply.',
)
@click.option("--completions", is_flag=True, help="Ask questions as plain completions, not as chats.")
@click.option("--answer-tokens", default=64, show_default=True, type=click.IntRange(1), help="Length of answers.")
@click.option("--tolerance", default=0.2, show_default=True, type=click.FloatRange(0), help="Of log probabilities.")
@click.option("--concurrent", default=16, show_default=True, type=click.IntRange(1), help="Requests in tier 2 and 3.")
@click.option("--sequential", default=50, show_default=True, type=click.IntRange(1), help="Requests in tier 4.")
@common
@click.pass_context
def validate(
    context: click.Context,
    run: Invocation,
    url: str,
    api_key: str | None,
    model: str | None,
    ids: tuple[str, ...],
    cartridges: tuple[tuple[str, Path], ...],
    documents: tuple[tuple[str, Path], ...],
    questions: Path | None,
    completions: bool,
    answer_tokens: int,
    tolerance: float,
    concurrent: int,
    sequential: int,
) -> None:
    """Try a live server's cartridges, tier by tier, as a client does. The exit status is 3 if one of them fails.

    Where the document of a lossless cartridge is known, answers are compared with those to a prompt that holds it.
    Trained cartridges have questions instead.
    """
    import httpx2

    from kvist.cli.cartridge_tiers import FAILED, Asker, Plan, Tiers

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with httpx2.Client(base_url=url, headers=headers, timeout=_TIMEOUT_S, limits=httpx2.Limits()) as http:
        ask = Asker(http, model)
        plan = Plan(
            ids=ids or _served(ask),
            documents=_documents(cartridges, documents),
            questions=_read_questions(questions) if questions is not None else (),
            uses_chat=not completions,
            answer_tokens=answer_tokens,
            tolerance=tolerance,
            concurrent=concurrent,
            sequential=sequential,
        )
        tiers = Tiers(ask, plan)
        results = []
        with run.out.progress("validating") as report:
            for result in tiers.run():
                results.append(result)
                if report is not None:
                    report(len(results), tiers.count)
    failed = [result.tier for result in results if result.outcome == FAILED]
    document = {
        "url": url,
        "model": ask.model,
        "cartridges": list(plan.ids),
        "passed": not failed,
        "tiers": [asdict(result) for result in results],
    }
    rows = [(result.tier, result.name, result.outcome, result.detail) for result in results]
    run.out.result(document, ids=failed, text=[Table(("Tier", "What", "Outcome", "Detail"), rows)])
    context.exit(FINDINGS if failed else 0)


def _served(ask: Asker) -> list[str]:
    return [record["id"] for record in ask.get("/v1/kvist/cartridges")["cartridges"]]


def _documents(cartridges: tuple[tuple[str, Path], ...], documents: tuple[tuple[str, Path], ...]) -> dict[str, Prompt]:
    found: dict[str, Prompt] = {name: path.read_text(encoding="utf-8") for name, path in documents}
    for name, path in cartridges:
        from kvist.cartridge.cartridge import Cartridge

        with Cartridge.from_pretrained(path) as cartridge:
            if cartridge.token_ids is None:
                raise InvalidInput(f"{path}: this cartridge does not say the token ids of a document")
            found[name] = list(cartridge.token_ids)
    return found


def _read_questions(path: Path) -> list[Question]:
    from kvist.cli.cartridge_tiers import Question

    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(Question(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise InvalidInput(
                f'{path}, line {number}: expected {{"question", "answer", "cartridge"?}}: {error}'
            ) from None
    if not found:
        raise InvalidInput(f"{path}: expected at least one question, got none")
    return found
