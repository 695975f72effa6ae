"""`kvist cartridge import`: a checkpoint of another project becomes a cartridge."""

from __future__ import annotations

from pathlib import Path

import click

from kvist.cli.cartridge_options import require_free, with_result
from kvist.cli.invocation import Invocation, common
from kvist.cli.output import Styled


@click.command("import")
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--model",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="The model that it is for, checked and pinned.  [default: what the checkpoint says]",
)
@click.option("--model-id", metavar="ORG/NAME", help="What that model is called.  [default: the directory's name]")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Convert to it.  [default: as the checkpoint is]",
)
@click.option(
    "--manifest",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Its sidecar manifest.  [default: CHECKPOINT.json, if there is one]",
)
@with_result
@common
def import_(
    run: Invocation,
    checkpoint: Path,
    model: Path | None,
    model_id: str | None,
    dtype: str | None,
    manifest: Path | None,
    output: Path,
    cartridge_id: str | None,
    labels: dict[str, str],
    license_: str,
) -> None:
    """Make a cartridge of another project's checkpoint. Nothing in it is run.

    Read are HazyResearch's and Tokasaurus' TrainableCache, reason caches, PEFT's adapters, caches of transformers saved
    as tensors, and knlp's directories; what could only be read by running it is refused, by the name of its class.
    """
    from kvist.cartridge.formats import import_checkpoint
    from kvist.cartridge.model import ModelIdentity
    from kvist.hashing.weights import revision

    if model_id is not None and model is None:
        raise click.UsageError("--model-id names the model of --model")
    require_free(output)
    identity = None
    if model is not None:
        own = ModelIdentity.of_directory(model).dtype
        pinned = revision(model.resolve())
        identity = ModelIdentity.of_directory(model, dtype=dtype or own, model_id=model_id, revision=pinned)
    made = import_checkpoint(
        checkpoint,
        identity,
        cartridge_id=cartridge_id,
        default_id=output.resolve().name,
        manifest_path=manifest,
        dtype=dtype,
        labels=labels,
        license=license_,
    )
    made.save_pretrained(output)
    about = made.manifest
    result = {
        "cartridge_id": about.cartridge_id,
        "identity": made.identity,
        "directory": str(output),
        "source_format": about.source_format,
        "model_id": about.model_id,
        "tokens": made.num_tokens,
        "frozen_tokens": about.num_frozen_tokens,
        "bytes": made.nbytes,
    }
    size = f": {made.num_tokens:,} tokens, {made.nbytes:,} bytes, from {about.source_format}, in {output}"
    run.out.result(result, ids=[about.cartridge_id], text=[(Styled(about.cartridge_id, "yellow"), size)])
