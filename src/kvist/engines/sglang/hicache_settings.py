"""What ``--hicache-storage-backend-extra-config`` says to the backend. Knows its keys; imports no SGLang."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Self

from kvist.engines.paged.options import ChunkOptions
from kvist.errors import InvalidInput

_SGLANG: Final = {"backend_name", "module_path", "class_name", "interface_v1", "allocator"}
"""Keys that SGLang reads itself and leaves in the mapping."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(ChunkOptions):
    """Options of the backend: the keys of SGLang's mapping that are not its own.

    ``staging_bytes`` bounds what one write takes at once; a longer one is stored in several. A ``revision`` that is not
    given is found out, see `kvist.engines.sglang.hicache_host.pinned`.
    """

    refresh_s: float = 1.0

    @classmethod
    def of_config(cls, extra: Mapping[str, Any] | None) -> Self:
        """The options in SGLang's mapping.

        Raises:
            InvalidInput: an unknown option, or a value that cannot be.
        """
        options = {name: value for name, value in (extra or {}).items() if name not in _SGLANG}
        known = [field.name for field in fields(cls)]
        if unknown := options.keys() - set(known):
            raise InvalidInput(
                f"--hicache-storage-backend-extra-config: expected {', '.join(known)}, "
                f"got {', '.join(sorted(map(str, unknown)))}"
            )
        if "store" not in options:
            raise InvalidInput(
                "--hicache-storage-backend-extra-config: store is missing: the url or path of a repository"
            )
        return cls(**options)
