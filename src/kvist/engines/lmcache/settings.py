"""What an LMCache configuration says to the plugin. Knows its ``extra_config``; imports no LMCache.

LMCache does not tell a plugin the name that it was given, so it is found by class and module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

from kvist.engines.paged.options import ChunkOptions
from kvist.errors import InvalidInput

_OWN: Final = {"module_path", "class_name"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(ChunkOptions):
    """Options of one plugin: the keys ``storage_plugin.<name>.<option>`` of ``extra_config``.

    What comes while ``staging_bytes`` are taken is not stored. A ``revision`` that is not given is computed, where
    LMCache's model name is a directory.

    Attributes:
        cartridges: how cartridges are found, as in the vLLM connector (docs/guides/cartridges.md); empty: none are.
    """

    cartridges: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ChunkOptions.__post_init__(self)
        if not isinstance(self.cartridges, Mapping):
            raise InvalidInput(f"cartridges must be a mapping, got {self.cartridges!r:.80}")

    @classmethod
    def of_config(cls, extra: Mapping[str, Any] | None, plugins: Sequence[str] | None, owner: type) -> Self:
        """The options of the one plugin whose class is ``owner``.

        Args:
            extra: ``extra_config`` of an LMCache configuration.
            plugins: its ``storage_plugins``.
            owner: the plugin's class.

        Raises:
            InvalidInput: none or several plugins are of this class, an unknown option, or a value that cannot be.
        """
        extra = extra or {}
        names = [name for name in dict.fromkeys(plugins or ()) if _is_of(extra, name, owner)]
        if len(names) != 1:
            raise InvalidInput(
                f"expected one plugin of class {owner.__name__} among storage_plugins {list(plugins or ())!r:.200}, "
                f"got {names!r:.200}",
                hint=f"extra_config: storage_plugin.<name>.class_name: {owner.__name__}",
            )
        prefix = f"storage_plugin.{names[0]}."
        given = {key.removeprefix(prefix): value for key, value in extra.items() if key.startswith(prefix)}
        options = {name: value for name, value in given.items() if name not in _OWN}
        if unknown := options.keys() - cls.__dataclass_fields__.keys():
            raise InvalidInput(
                f"{prefix}*: expected {', '.join(cls.__dataclass_fields__)}, got {', '.join(sorted(unknown))}"
            )
        if "store" not in options:
            raise InvalidInput(f"{prefix}store is missing: the url or path of a repository")
        return cls(**options)


def _is_of(extra: Mapping[str, Any], name: str, owner: type) -> bool:
    module = extra.get(f"storage_plugin.{name}.module_path")
    is_ours = module in (owner.__module__, owner.__module__.rpartition(".")[0])
    return is_ours and extra.get(f"storage_plugin.{name}.class_name") == owner.__name__
