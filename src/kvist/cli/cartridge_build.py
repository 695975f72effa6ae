"""`kvist cartridge build`: the keys and values of a text, kept."""

from __future__ import annotations

from pathlib import Path

import click

from kvist.cli.cartridge_options import read_text, require_free, with_model, with_result
from kvist.cli.invocation import Invocation, common
from kvist.cli.output import Styled


@click.command()
@with_model
@with_result
@click.option("--max-tokens", type=click.IntRange(1), help="Refuse a longer text.  [default: the model's positions]")
@click.option("--chunk", default=512, show_default=True, type=click.IntRange(1), help="Tokens of one forward pass.")
@common
def build(
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
    max_tokens: int | None,
    chunk: int,
) -> None:
    """Prefill a text and keep its KV: lossless.

    All of the text is kept, or it is refused: nothing is cut off. A prompt that goes on after the cartridge is answered
    as if the text stood before it.
    """
    from kvist.cartridge.build import build as make
    from kvist.cartridge.causal import CausalModel

    require_free(output)
    document = read_text(text)
    opened = CausalModel.open(model, device=device, dtype=dtype)
    with run.out.progress("prefill") as progress:
        made = make(
            opened,
            document,
            cartridge_id=cartridge_id or output.resolve().name,
            is_chat=system,
            max_tokens=max_tokens,
            chunk=chunk,
            source_document=text.name,
            labels=labels,
            license=license_,
            progress=progress,
        )
    made.save_pretrained(output)
    result = {
        "cartridge_id": made.manifest.cartridge_id,
        "identity": made.identity,
        "directory": str(output),
        "tokens": made.num_tokens,
        "bytes": made.nbytes,
    }
    name = made.manifest.cartridge_id
    line = (Styled(name, "yellow"), f": {made.num_tokens:,} tokens, {made.nbytes:,} bytes, in {output}")
    run.out.result(result, ids=[name], text=[line])
