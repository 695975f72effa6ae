"""The library: every cartridge that this process can serve, those of its configuration and those of a registry.

Knows ids, labels, directories and the model that is served. Opens no tensors: an engine does, from a directory.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from kvist.cartridge.manifest import CartridgeManifest
from kvist.cartridge.manifest_file import read_manifest
from kvist.cartridge.model import ModelIdentity
from kvist.errors import DamagedCartridge, InvalidCartridge, InvalidInput, StoreError, UnknownCartridge

if TYPE_CHECKING:
    from kvist.cartridge.registry import Registration, Registry  # a database's client, which few need

log = logging.getLogger("kvist.cartridge")

Source = str | Mapping[str, Any]
"""A path, or where else a cartridge comes from (see `kvist.cartridge.config`)."""
_SHOWN: Final = 10


@dataclass(frozen=True, slots=True)
class Entry:
    """A cartridge that can be loaded.

    Attributes:
        cartridge_id: by which requests name it; not always that of the manifest in the directory.
        directory: with its ``cartridge.json`` and shards.
        manifest: of what is there.
    """

    cartridge_id: str
    directory: Path
    manifest: CartridgeManifest


def open_source(source: Source, *, cache_dir: Path, model: ModelIdentity | None) -> tuple[Path, CartridgeManifest]:
    """The directory of a cartridge, made in ``cache_dir`` if need be, and the manifest there.

    Raises:
        KvistError: there is none, it cannot be had, or it is not a cartridge that can be trusted.
    """
    from kvist.cartridge.sources import materialize  # imports torch

    directory = materialize(source, cache_dir=cache_dir, model=model)
    return directory, read_manifest(directory)


@dataclass(slots=True)
class _Registered:
    """One of the registry, opened when it is first asked for."""

    registration: Registration
    fits: bool
    entry: Entry | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def open(self, cache_dir: Path) -> Entry:
        with self.lock:
            if self.entry is None:
                told = self.registration
                # what a source does not say of its model was said when it was registered
                directory, found = open_source(_source(told.location), cache_dir=cache_dir, model=told.manifest.model)
                if found.identity != told.manifest.identity:
                    raise DamagedCartridge(
                        f"cartridge {told.cartridge_id}: expected the content {told.manifest.identity} that was "
                        f"registered, got {found.identity} in {directory}",
                        hint=f"if that is meant: kvist cartridge add {directory}",
                    )
                self.entry = Entry(told.cartridge_id, directory, told.manifest)
            return self.entry


@dataclass(frozen=True, slots=True)
class _Shelf:
    """What the registry said at one version; never changed, only replaced.

    Attributes:
        by_id: in the order of registration; those for other models too, and none that a configured one hides.
        by_identity: content to id, of the first.
        by_label: key and value to ids.
    """

    version: int = -1
    by_id: Mapping[str, _Registered] = field(default_factory=dict)
    by_identity: Mapping[str, str] = field(default_factory=dict)
    by_label: Mapping[tuple[str, str], list[str]] = field(default_factory=dict)


class Library:
    """See the module. Thread-safe; to look something up takes no lock and, once it is open, no disk.

    A configured cartridge hides a registered one of the same id. Registered ones for other models are passed over,
    unless they are asked for by id: then the difference is told.
    """

    def __init__(
        self,
        entries: Iterable[Entry] = (),
        *,
        registry: Registry | None = None,
        model: ModelIdentity | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        """Read the registry's list.

        Args:
            entries: configured ones; the first is the default.
            registry: asked for more; closed with the library.
            model: that they have to fit; ``None``: any.
            cache_dir: for what registered cartridges come from, if not from directories; default the user's.

        Raises:
            InvalidInput: two entries with one id.
            LayoutMismatch: an entry is not for the model.
            StoreError: the registry failed.
        """
        self._entries: dict[str, Entry] = {}
        for entry in entries:
            if entry.cartridge_id in self._entries:
                raise InvalidInput(f"expected each cartridge_id once, got {entry.cartridge_id} twice")
            if model is not None:
                entry.manifest.require(model)
            self._entries[entry.cartridge_id] = entry
        self._registry, self._model = registry, model
        self._cache_dir = cache_dir if cache_dir is not None else default_cache_dir()
        self._refreshing = threading.Lock()
        self._is_cut_off = False
        self._shelf = _Shelf() if registry is None else self._read(registry, _Shelf())
        self._own = self._index(self._entries.values())

    @property
    def default_id(self) -> str | None:
        """The first that is configured."""
        return next(iter(self._entries), None)

    @property
    def configured_ids(self) -> frozenset[str]:
        """Those that no registry can replace or remove."""
        return frozenset(self._entries)

    @property
    def model(self) -> ModelIdentity | None:
        """What cartridges have to fit; ``None``: any."""
        return self._model

    @property
    def cache_dir(self) -> Path:
        """For what comes from elsewhere than a directory."""
        return self._cache_dir

    @property
    def registry(self) -> Registry | None:
        """Where cartridges come from while the process runs; borrowed."""
        return self._registry

    def ids(self) -> list[str]:
        """All that fit the model: configured ones, then registered ones in the order of registration."""
        return [*self._entries, *(name for name, one in self._shelf.by_id.items() if one.fits)]

    def get(self, cartridge_id: str) -> Entry:
        """The cartridge of this id. The first time, it is fetched or converted if its location is no directory.

        One that was registered since the last `refresh` is found; one that was removed since is, too.

        Raises:
            UnknownCartridge: there is none.
            LayoutMismatch: it is for another model.
            DamagedCartridge: what is at its location is not what was registered.
            KvistError: it cannot be had from where it is.
        """
        entry = self._entries.get(cartridge_id)
        if entry is not None:
            return entry
        found = self._shelf.by_id.get(cartridge_id)
        if found is None:
            self.refresh()
            found = self._shelf.by_id.get(cartridge_id)
        if found is None:
            raise self._unknown(cartridge_id)
        if not found.fits and self._model is not None:
            found.registration.manifest.require(self._model)
        return found.entry or found.open(self._cache_dir)

    def by_identity(self, identity: str) -> Entry | None:
        """The first cartridge with this content, if any has it.

        Raises:
            KvistError: as `get`.
        """
        found = self._own.by_identity.get(identity) or self._shelf.by_identity.get(identity)
        return None if found is None else self.get(found)

    def ids_by_label(self, key: str, value: str) -> list[str]:
        """Those of `ids` that carry the label, in the same order."""
        found = self._find_label(key, value)
        if not found:
            self.refresh()
            found = self._find_label(key, value)
        return found

    def refresh(self) -> bool:
        """Take up what has changed in the registry; whether anything has.

        A registry that cannot be reached, or holds what this version cannot read, changes nothing, and is logged once.
        """
        registry = self._registry
        if registry is None:
            return False
        with self._refreshing:
            try:
                if registry.version() == self._shelf.version:
                    self._is_cut_off = False
                    return False
                self._shelf = self._read(registry, self._shelf)
            except (StoreError, InvalidCartridge) as error:
                if not self._is_cut_off:
                    log.warning("cartridges stay as they are until the registry can be read: %s", error)
                self._is_cut_off = True
                return False
            self._is_cut_off = False
            return True

    def close(self) -> None:
        """Close the registry."""
        if self._registry is not None:
            self._registry.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _find_label(self, key: str, value: str) -> list[str]:
        return [*self._own.by_label.get((key, value), []), *self._shelf.by_label.get((key, value), [])]

    def _unknown(self, cartridge_id: str) -> UnknownCartridge:
        known = self.ids()
        shown = ", ".join(known[:_SHOWN]) + (f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else "")
        add = None if self._registry is None else "to register one: kvist cartridge add DIRECTORY"
        return UnknownCartridge(f"there is no cartridge {cartridge_id!r:.120}; there are: {shown or 'none'}", hint=add)

    def _read(self, registry: Registry, old: _Shelf) -> _Shelf:
        version = registry.version()  # before the list, which may be newer: then it is read once more
        by_id: dict[str, _Registered] = {}
        for told in registry.list_all():
            if told.cartridge_id in self._entries:
                continue
            kept = old.by_id.get(told.cartridge_id)
            if kept is None or kept.registration != told:
                fits = self._model is None or not told.manifest.validate_against_model(self._model)
                kept = _Registered(told, fits)
            by_id[told.cartridge_id] = kept
        index = self._index(one.registration for one in by_id.values() if one.fits)
        return _Shelf(version, by_id, index.by_identity, index.by_label)

    @staticmethod
    def _index(entries: Iterable[Entry | Registration]) -> _Shelf:
        by_identity: dict[str, str] = {}
        by_label: dict[tuple[str, str], list[str]] = {}
        for entry in entries:
            by_identity.setdefault(entry.manifest.identity, entry.cartridge_id)
            for label in entry.manifest.labels.items():
                by_label.setdefault(label, []).append(entry.cartridge_id)
        return _Shelf(by_identity=by_identity, by_label=by_label)


def default_cache_dir() -> Path:
    """Where converted and fetched cartridges are kept for this user."""
    import platformdirs

    return platformdirs.user_cache_path("kvist") / "cartridges"


def _source(location: str) -> Source:
    if not location.startswith("{"):
        return location
    source: Mapping[str, Any] = json.loads(location)
    return source
