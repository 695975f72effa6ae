"""Cartridges of other projects, read without running anything in them.

Containers: `archive` and `pickled` (files of `torch.save`, put together by `torch_file`), and `safetensors_file`.
Families, by the keys of what they hold: `trainable` (HazyResearch, Tokasaurus, reason caches), `past_key_values`
(transformers, knlp), `peft`. `reading` finds out which, `sidecar` reads the manifests beside them, `importing` makes a
cartridge. Knows torch's tensors; runs none of its loaders.
"""

from kvist.cartridge.formats.imported import Imported
from kvist.cartridge.formats.importing import import_checkpoint
from kvist.cartridge.formats.reading import read_checkpoint

__all__ = ["Imported", "import_checkpoint", "read_checkpoint"]
