"""Files of safetensors, as a tree: a name such as ``key_cache.0`` is a list's item.

Knows names. The reading itself is `kvist.cartridge.shards`. Must not know families.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from kvist.cartridge.formats.stored import StoredTensor
from kvist.cartridge.shards import TORCH_DTYPES, Shard
from kvist.errors import InvalidCartridge

_DEPTH_MAX: Final = 8


@contextmanager
def open_safetensors_file(path: Path) -> Iterator[Any]:
    """The tree of a file: dicts by the parts of names between dots, lists where these are 0, 1, 2 and so on.

    Raises:
        InvalidCartridge: it is no such file, or a name is also the beginning of another.
    """
    with Shard(path) as shard:
        tree: dict[str, Any] = {}
        for name, entry in shard.header().items():
            *above, last = name.split(".")
            if len(above) >= _DEPTH_MAX:
                raise InvalidCartridge(f"{path}: tensor {name!r:.80} has more than {_DEPTH_MAX} parts")
            branch = tree
            for part in above:
                branch = branch.setdefault(part, {})
                if not isinstance(branch, dict):
                    raise InvalidCartridge(f"{path}: tensor {name!r:.80} lies below another tensor")
            if last in branch:
                raise InvalidCartridge(f"{path}: other tensors lie below {name!r:.80}")
            dtype = str(TORCH_DTYPES[entry.dtype]).removeprefix("torch.")
            # cloned: what is read outlives the file, which may change below a map
            branch[last] = StoredTensor(dtype, entry.shape, lambda entry=entry: shard.tensor(entry).clone())  # type: ignore[misc]
        yield _with_lists(tree)


def _with_lists(tree: dict[str, Any]) -> Any:
    items = {name: _with_lists(item) if isinstance(item, dict) else item for name, item in tree.items()}
    numbers = [str(number) for number in range(len(items))]
    return [items[number] for number in numbers] if items and set(items) == set(numbers) else items
