"""The library: every cartridge that this process can serve, those of its configuration and those of a registry.

Knows ids, labels, directories and the model that is served. Opens no tensors: an engine does, from a directory.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from kvist.cartridge.background import Ticker, start
from kvist.cartridge.manifest import CartridgeManifest
from kvist.cartridge.manifest_file import read_manifest
from kvist.cartridge.model import ModelIdentity
from kvist.cartridge.sources import materialize
from kvist.errors import (
    CartridgeNotReady,
    DamagedCartridge,
    InvalidInput,
    KvistError,
    StoreError,
    UnknownCartridge,
)

if TYPE_CHECKING:
    from kvist.cartridge.registry import Registration, Registry  # a database's client, which few need

log = logging.getLogger("kvist.cartridge")

Source = str | Mapping[str, Any]
"""A path, or where else a cartridge comes from (see `kvist.cartridge.config`)."""
_SHOWN: Final = 10
_EVERY_S: Final = 1.0
"""Between two looks at the registry of who does not wait for one."""
_BACK_OFF_S: Final = 5.0
"""After the registry failed, for so long nobody asks it."""
_AWAITED: Final = 1000
"""Unknown ids of which it is remembered when they were asked for."""


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
    directory = materialize(source, cache_dir=cache_dir, model=model)
    return directory, read_manifest(directory)


@dataclass(slots=True)
class _Registered:
    """One of the registry, opened when it is first asked for.

    Attributes:
        error: why it could not be opened the last time.
        is_opening: a thread of the library is about to.
    """

    registration: Registration
    fits: bool
    entry: Entry | None = None
    error: KvistError | None = None
    is_opening: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def open(self, cache_dir: Path) -> Entry:
        with self.lock:
            if self.entry is None:
                try:
                    self.entry = self._open(cache_dir)
                except KvistError as error:
                    self.error = error
                    raise
                self.error = None
            return self.entry

    def _open(self, cache_dir: Path) -> Entry:
        told = self.registration
        # what a source does not say of its model was said when it was registered
        directory, found = open_source(source_of(told.location), cache_dir=cache_dir, model=told.manifest.model)
        if found.identity != told.manifest.identity:
            raise DamagedCartridge(
                f"cartridge {told.cartridge_id}: expected the content {told.manifest.identity} that was "
                f"registered, got {found.identity} in {directory}",
                hint=f"if that is meant: kvist cartridge add {directory}",
            )
        return Entry(told.cartridge_id, directory, told.manifest)

    def ready(self, cache_dir: Path) -> Entry:
        """The entry; while there is none, a thread opens it, and `CartridgeNotReady` is raised."""
        if self.entry is not None:
            return self.entry
        if not self.is_opening:
            if (error := self.error) is not None:
                self.error = None  # told once; who asks after that has it tried again
                raise error
            self.is_opening = True
            start(lambda: self._open_aside(cache_dir), "kvist-open-cartridge")
        raise CartridgeNotReady(
            f"cartridge {self.registration.cartridge_id} is being fetched or converted", hint="try again in a moment"
        )

    def _open_aside(self, cache_dir: Path) -> None:
        try:
            self.open(cache_dir)
        except KvistError as error:
            log.warning("cartridge %s cannot be opened: %s", self.registration.cartridge_id, error)
        finally:
            self.is_opening = False


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

    There are two ways to ask. `get` and `refresh` wait: for a database, for a file that is converted, for a download;
    threads that may wait use them. `ready` and `nudge` do not: threads of the library see to it, and who asks comes
    again. A registry that failed is not asked again for some seconds, on either way.

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
        self._failed_at: float | None = None  # in `time.monotonic`, while the registry cannot be read
        self._looks_begun = self._looks_ended = 0
        self._awaited: OrderedDict[str, int] = OrderedDict()  # unknown ids, with the looks begun before they were
        self._ticker = Ticker(self._look, _EVERY_S, "kvist-registry")
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
        if (entry := self._entries.get(cartridge_id)) is not None:
            return entry
        if cartridge_id not in self._shelf.by_id:
            self.refresh()
        found = self._registered(cartridge_id)
        if found is None:
            raise self._unknown(cartridge_id)
        return found.entry or found.open(self._cache_dir)

    def ready(self, cartridge_id: str) -> Entry:
        """As `get`, of what can be had without waiting for a disk, a network or a database.

        Raises:
            CartridgeNotReady: it is being opened; or it is not known yet, and the registry is being asked.
            KvistError: as `get`, once that has been tried; the next request has it tried again.
        """
        if (entry := self._entries.get(cartridge_id)) is not None:
            return entry
        found = self._registered(cartridge_id)
        if found is not None:
            self._awaited.pop(cartridge_id, None)
            return found.ready(self._cache_dir)
        if self._registry is None:
            raise self._unknown(cartridge_id)
        asked = self._awaited.setdefault(cartridge_id, self._looks_begun)
        while len(self._awaited) > _AWAITED:
            self._awaited.popitem(last=False)
        if self._looks_ended > asked:  # one that began after this was asked for the first time
            raise self._unknown(cartridge_id)
        self.nudge()
        raise CartridgeNotReady(
            f"there is no cartridge {cartridge_id!r:.120} yet; the registry is being asked",
            hint="try again in a moment",
        )

    def known(self) -> list[tuple[str, CartridgeManifest, KvistError | None]]:
        """Of each of `ids`, without opening it: id, manifest, and why it could not be opened the last time."""
        own = [(name, entry.manifest, None) for name, entry in self._entries.items()]
        there = [(name, one) for name, one in self._shelf.by_id.items() if one.fits]
        return [*own, *((name, one.registration.manifest, one.error) for name, one in there)]

    def by_identity(self, identity: str) -> Entry | None:
        """The first cartridge with this content, if any has it.

        Raises:
            KvistError: as `get`.
        """
        found = self._own.by_identity.get(identity) or self._shelf.by_identity.get(identity)
        return None if found is None else self.get(found)

    def ids_by_label(self, key: str, value: str) -> list[str]:
        """Those of `ids` that carry the label, in the same order; as of the last look at the registry."""
        found = [*self._own.by_label.get((key, value), []), *self._shelf.by_label.get((key, value), [])]
        if not found:
            self.nudge()
        return found

    def nudge(self) -> None:
        """Have what has changed in the registry taken up soon, and from now on every second. Does not wait."""
        if self._registry is not None:
            self._ticker.nudge()

    def refresh(self) -> bool:
        """Take up what has changed in the registry; whether anything has.

        A registry that cannot be reached changes nothing, is logged once, and is not asked again for some seconds. What
        it holds and this version cannot read is passed over.
        """
        registry = self._registry
        if registry is None or self._is_backing_off():
            return False
        with self._refreshing:
            if self._is_backing_off():  # it failed for who had the lock
                return False
            try:
                if is_new := registry.version() != self._shelf.version:
                    self._shelf = self._read(registry, self._shelf)
            except StoreError as error:
                if self._failed_at is None:
                    log.warning("cartridges stay as they are until the registry can be read: %s", error)
                self._failed_at = time.monotonic()
                return False
            self._failed_at = None
            return is_new

    def close(self) -> None:
        """Close the registry."""
        self._ticker.close()
        if self._registry is not None:
            self._registry.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _registered(self, cartridge_id: str) -> _Registered | None:
        found = self._shelf.by_id.get(cartridge_id)
        if found is not None and not found.fits and self._model is not None:
            found.registration.manifest.require(self._model)
        return found

    def _is_backing_off(self) -> bool:
        failed_at = self._failed_at
        return failed_at is not None and time.monotonic() < failed_at + _BACK_OFF_S

    def _look(self) -> None:
        self._looks_begun += 1
        try:
            self.refresh()
        except Exception:  # a bug; the thread is all that there is to take up the registry
            log.exception("the registry cannot be taken up")
        self._looks_ended += 1

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


def source_of(location: str) -> Source:
    """What a registration's location says, for `open_source`."""
    if not location.startswith("{"):
        return location
    source: Mapping[str, Any] = json.loads(location)
    return source
