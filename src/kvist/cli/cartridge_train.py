"""`kvist cartridge train`: a text distilled into fewer tokens than it has."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvist.cli.cartridge_options import read_text, require_free, with_model, with_result
from kvist.cli.invocation import Invocation, common
from kvist.cli.output import Styled
from kvist.errors import AlreadyExists

if TYPE_CHECKING:
    from kvist.cartridge.causal import CausalModel
    from kvist.cartridge.framing import Framing
    from kvist.cartridge.train import Conversation

_COUNT = click.IntRange(1)
_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command()
@with_model
@with_result
@click.option("--tokens", required=True, type=_COUNT, help="Of the cartridge; fewer than the text has.")
@click.option("--conversations", type=_FILE, metavar="FILE", help='JSON lines of "prompt" and, if known, "completion".')
@click.option("--self-study", type=_COUNT, metavar="N", help="Let the model make N conversations; needs --system.")
@click.option("--answer-tokens", default=256, show_default=True, type=_COUNT, help="Most of an answer it gives there.")
@click.option("--steps", default=500, show_default=True, type=_COUNT, help="Of the optimizer.")
@click.option("--batch", default=16, show_default=True, type=_COUNT, help="Conversations a step.")
@click.option("--rows", default=8, show_default=True, type=_COUNT, help="Of these, so many in one forward pass.")
@click.option("--rate", default=2e-2, show_default=True, type=click.FLOAT, help="Adam's, at its peak.")
@click.option("--warmup", default=20, show_default=True, type=click.IntRange(0), help="Steps in which it gets there.")
@click.option("--frozen", default=1, show_default=True, type=click.IntRange(0), help="First tokens that stay so.")
@click.option(
    "--start",
    default="first",
    show_default=True,
    type=click.Choice(["first", "spread"]),
    help="Begin with the text's first tokens, or with pieces from all over it.",
)
@click.option("--top-k", type=_COUNT, help="Compare so many ids of the teacher alone.  [default: all]")
@click.option("--seed", default=0, show_default=True, type=click.INT, help="Of all that is drawn.")
@click.option("--every", default=50, show_default=True, type=_COUNT, help="Steps from one checkpoint to the next.")
@click.option("--resume", is_flag=True, help="Go on where a run with the same options was stopped.")
@common
def train(
    run: Invocation,
    model: Path,
    text: Path,
    system: bool,
    device: str,
    dtype: str | None,
    output: Path,
    cartridge_id: str | None,
    labels: dict[str, str],
    license_: str,
    tokens: int,
    conversations: Path | None,
    self_study: int | None,
    answer_tokens: int,
    steps: int,
    batch: int,
    rows: int,
    rate: float,
    warmup: int,
    frozen: int,
    start: str,
    top_k: int | None,
    seed: int,
    every: int,
    resume: bool,
) -> None:
    """Distil a text into fewer tokens than it has.

    The model's answers with the whole text in view are what it learns to give with the cartridge alone. Checkpoint,
    conversations and the plot of the loss are in a directory beside the output, named like it with .training.
    """
    from kvist.cartridge.causal import CausalModel
    from kvist.cartridge.framing import Framing
    from kvist.cartridge.train import Distillation, TrainSettings, read_conversations
    from kvist.cartridge.train.plot import png

    if (conversations is None) == (self_study is None):
        raise click.UsageError("give one of --conversations and --self-study")
    settings = TrainSettings(
        tokens=tokens,
        frozen_tokens=frozen,
        start="spread" if start == "spread" else "first",
        steps=steps,
        batch=batch,
        rows=rows,
        rate=rate,
        warmup=warmup,
        top_k=top_k,
        seed=seed,
    )
    require_free(output)
    beside = _open_beside(output, resume)
    document = read_text(text)
    opened = CausalModel.open(model, device=device, dtype=dtype)
    framing = Framing(opened.tokenizer, is_chat=system)
    if conversations is not None:
        talks = read_conversations(conversations)
    else:
        talks = _study(run, opened, framing, document, beside, self_study or 0, answer_tokens, seed)
    distillation = Distillation(opened, framing, document, talks, answer_tokens=answer_tokens)
    with run.out.progress("train") as progress:
        trained = distillation.train(settings, saves=beside / "checkpoint.safetensors", every=every, progress=progress)
    name = cartridge_id or output.resolve().name
    made = distillation.package(
        trained, settings, cartridge_id=name, source_document=text.name, labels=labels, license=license_
    )
    made.save_pretrained(output)
    plot = beside / "loss.png"
    if importlib.util.find_spec("matplotlib") is None:
        run.out.note(f"no {plot}: matplotlib is not installed")
    else:
        plot.write_bytes(png(trained.losses, f"{name}: {len(distillation.document):,} tokens into {tokens:,}"))
    last: float = made.manifest.provenance["last_loss"]
    result = {
        "cartridge_id": name,
        "identity": made.identity,
        "directory": str(output),
        "tokens": made.num_tokens,
        "document_tokens": len(distillation.document),
        "bytes": made.nbytes,
        "steps": steps,
        "first_loss": trained.losses[0],
        "last_loss": last,
        "losses": trained.losses,
        "training": str(beside),
    }
    into = f": {len(distillation.document):,} tokens into {made.num_tokens:,}, in {output}"
    loss = f"loss {trained.losses[0]:.4f} at first, {last:.4f} at last, nats per token; {beside}"
    run.out.result(result, ids=[name], text=[(Styled(name, "yellow"), into), loss])


def _open_beside(output: Path, resume: bool) -> Path:
    """The directory of the run."""
    beside = output.with_name(output.name + ".training")
    if beside.exists() and not resume:
        raise AlreadyExists(
            f"{str(beside)!r} is of an earlier run",
            hint="go on with it: --resume; else remove it, or name another --output",
        )
    beside.mkdir(parents=True, exist_ok=True)
    return beside


def _study(
    run: Invocation,
    model: CausalModel,
    framing: Framing,
    text: str,
    beside: Path,
    count: int,
    answer_tokens: int,
    seed: int,
) -> list[Conversation]:
    """Conversations of an earlier run, or new ones; a file with all of them is there only once they are all made."""
    from kvist.cartridge.train import StudySettings, read_conversations, study, write_conversations

    whole, partial = beside / "conversations.jsonl", beside / "conversations.partial.jsonl"
    if not whole.is_file():
        partial.unlink(missing_ok=True)
        settings = StudySettings(count=count, answer_tokens=answer_tokens, seed=seed)
        made = 0
        with run.out.progress("self-study") as progress:
            for batch in study(model, framing, framing.document(text), settings):
                write_conversations(partial, batch)
                made += settings.rows
                if progress is not None:
                    progress(min(made, count), count)
        partial.rename(whole)
    return read_conversations(whole)
