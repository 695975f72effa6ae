"""The group `kvist cartridge`: its table of commands. Each is imported when it is called, and they import torch."""

from __future__ import annotations

from typing import Final

import click

from kvist.cli.lazy import Lazy, LazyGroup

SECTIONS: Final[dict[str, dict[str, Lazy]]] = {
    "Make": {
        "build": Lazy("kvist.cli.cartridge_build:build", "Prefill a text and keep its KV: lossless."),
        "train": Lazy("kvist.cli.cartridge_train:train", "Distil a text into fewer tokens than it has."),
        "eval": Lazy("kvist.cli.cartridge_eval:evaluate", "Compare no context, document, and cartridges."),
        "import": Lazy("kvist.cli.cartridge_import:import_", "Make a cartridge of another project's checkpoint."),
    },
    "Keep": {
        "show": Lazy("kvist.cli.cartridge_files:show", "Describe a cartridge."),
        "verify": Lazy("kvist.cli.cartridge_files:verify", "Check every byte of a cartridge."),
        "commit": Lazy("kvist.cli.cartridge_files:commit", "Store a cartridge in the repository, as a snapshot."),
        "export": Lazy("kvist.cli.cartridge_files:export", "Write a snapshot as a cartridge's files."),
        "push": Lazy("kvist.cli.cartridge_push:push", "Upload a cartridge to the Hugging Face hub."),
    },
    "Serve": {
        "add": Lazy("kvist.cli.cartridge_registry:add", "Register a cartridge; running servers take it up."),
        "remove": Lazy("kvist.cli.cartridge_registry:remove", "Take a cartridge out of the registry."),
        "list": Lazy("kvist.cli.cartridge_registry:list_", "List what is registered."),
        "validate": Lazy("kvist.cli.cartridge_validate:validate", "Try a live server's cartridges, tier by tier."),
    },
}
"""Every command, in the order of `kvist cartridge --help`."""


class CartridgeGroup(LazyGroup):
    """Finds commands by `SECTIONS`."""

    sections = SECTIONS


@click.group(cls=CartridgeGroup, short_help="Build, train, register and check KV prefixes.")
def cartridge() -> None:
    """Build, train, register and check KV prefixes that requests share.

    A cartridge is a directory with a cartridge.json and safetensors (docs/spec/cartridge.md).
    """
