"""The registry: a database of cartridges, that many processes read and write at once.

Knows manifests, and where the files of each are. Reads no file of a cartridge. SQLite, or PostgreSQL for many machines.

Every change takes the one row of `kvist_registry` first and raises its version: so writers go one after the other on
either database, an order of registration exists, and readers see by one number whether anything has changed.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Self

import sqlalchemy as sql
from sqlalchemy import exc

from kvist.cartridge import database
from kvist.cartridge.manifest import CartridgeManifest
from kvist.errors import AlreadyExists, InvalidCartridge, InvalidInput, StoreError

log = logging.getLogger("kvist.cartridge")

SCHEMA: Final = 1
"""Version of the tables below."""

_KEY_BYTES: Final = 512
_VALUE_BYTES: Final = 2048
"""Longest label; together they fit a row of PostgreSQL's indexes."""
_LABELS: Final = 64
"""Most labels of one cartridge: every server reads all of them."""
_CREATING: Final = 0x6B76697374  # any number that no other program is likely to lock
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

_tables = sql.MetaData()
_registry = sql.Table(
    "kvist_registry",
    _tables,
    sql.Column("id", sql.Integer, primary_key=True),
    sql.Column("schema", sql.Integer, nullable=False),
    sql.Column("version", sql.BigInteger, nullable=False),
)
_cartridges = sql.Table(
    "kvist_cartridges",
    _tables,
    sql.Column("cartridge_id", sql.Text, primary_key=True),
    sql.Column("place", sql.BigInteger, nullable=False, index=True),  # the version at which it came
    sql.Column("location", sql.Text, nullable=False),
    sql.Column("model_id", sql.Text, nullable=False, index=True),
    sql.Column("size", sql.BigInteger, nullable=False),
    sql.Column("registered_us", sql.BigInteger, nullable=False),
    sql.Column("manifest", sql.Text, nullable=False),
)
_labels = sql.Table(
    "kvist_labels",
    _tables,
    sql.Column(
        "cartridge_id", sql.Text, sql.ForeignKey("kvist_cartridges.cartridge_id", ondelete="CASCADE"), primary_key=True
    ),
    sql.Column("key", sql.Text, primary_key=True),
    sql.Column("value", sql.Text, nullable=False),
    sql.Index("kvist_labels_by_value", "key", "value"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """One row.

    Attributes:
        cartridge_id: the manifest's.
        location: where its files are: an absolute path, or the JSON text of a source (see `kvist.cartridge.config`).
        manifest: as it was when it was registered.
        size: bytes of its files.
        registered_at: when, in UTC; the last time, if more than once.
    """

    cartridge_id: str
    location: str
    manifest: CartridgeManifest
    size: int
    registered_at: datetime


class Registry:
    """An open registry. Thread-safe, and safe beside other processes. Close it; a context manager does."""

    def __init__(self, url_or_path: str | Path) -> None:
        """Open, and make what is missing: the file, or the tables.

        Args:
            url_or_path: path of an SQLite file, or ``sqlite:///path``, or ``postgresql://user@host/database``.

        Raises:
            InvalidInput: another database, or one whose driver is not installed.
            StoreError: it cannot be reached, is no registry, or is one of another version.
        """
        self._url = database.parse(url_or_path)
        self._engine = database.connect(self._url)
        self._is_closed = False
        self._told: set[tuple[str, int]] = set()  # rows that cannot be read, by id and time
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """Its url, without a password and what else may be secret."""
        return database.shown(self._url)

    # -- changing ----------------------------------------------------------------------------------------------------

    def register(self, manifest: CartridgeManifest, location: str, *, replace: bool = True) -> Registration:
        """Add a cartridge, or replace the one of the same id; that keeps its place in the order.

        Args:
            manifest: of the files there.
            location: see `Registration`.
            replace: whether there may be one of the id.

        Raises:
            AlreadyExists: there is, and it may not.
            InvalidInput: a relative location, or text that a database cannot hold or find.
            InvalidCartridge: a manifest of another project.
            StoreError: the database failed; nothing has changed.
        """
        _check_location(location)
        if len(manifest.labels) > _LABELS:
            raise InvalidInput(f"labels: expected at most {_LABELS}, got {len(manifest.labels)}")
        for key, value in manifest.labels.items():
            _check_text(key, f"key {key!r:.80} of a label", _KEY_BYTES)
            _check_text(value, f"label {key!r:.80}", _VALUE_BYTES)
        cartridge_id = manifest.cartridge_id
        _check_text(cartridge_id, "cartridge_id", _KEY_BYTES)
        _check_text(manifest.model_id, "model_id", _VALUE_BYTES)
        text = manifest.to_json()
        CartridgeManifest.from_json(text)
        now_us = time.time_ns() // 1000
        with self._writing() as (connection, version):
            row = sql.select(_cartridges.c.place, _cartridges.c.location).filter_by(cartridge_id=cartridge_id)
            found = connection.execute(row).first()
            if found is not None and not replace:
                raise AlreadyExists(
                    f"cartridge {cartridge_id} is registered, at {found.location}",
                    hint=f"to take it out: kvist cartridge remove {cartridge_id}",
                )
            connection.execute(sql.delete(_labels).filter_by(cartridge_id=cartridge_id))
            connection.execute(sql.delete(_cartridges).filter_by(cartridge_id=cartridge_id))
            values = {
                "cartridge_id": cartridge_id,
                "place": version if found is None else found.place,
                "location": location,
                "model_id": manifest.model_id,
                "size": manifest.file_size_bytes,
                "registered_us": now_us,
                "manifest": text,
            }
            connection.execute(sql.insert(_cartridges).values(values))
            labels = [{"cartridge_id": cartridge_id, "key": key, "value": at} for key, at in manifest.labels.items()]
            if labels:
                connection.execute(sql.insert(_labels), labels)
        return _registration(cartridge_id, location, manifest, manifest.file_size_bytes, now_us)

    def unregister(self, cartridge_id: str) -> bool:
        """Take a cartridge out; its files stay. ``False`` if it was not there.

        Raises:
            StoreError: the database failed; nothing has changed.
        """
        if not _is_storable(cartridge_id):
            return False
        with self._writing() as (connection, _):
            connection.execute(sql.delete(_labels).filter_by(cartridge_id=cartridge_id))
            gone = connection.execute(sql.delete(_cartridges).filter_by(cartridge_id=cartridge_id)).rowcount
            if not gone:
                connection.rollback()  # the version, too
        return bool(gone)

    # -- asking: all raise StoreError if the database fails -----------------------------------------------------------
    #
    # A list leaves out what this version cannot read, and logs it once: a row of a later version must not hide others.

    def lookup(self, cartridge_id: str) -> Registration | None:
        """The one of this id, if there is.

        Raises:
            InvalidCartridge: there is, with a manifest that this version cannot read.
        """
        if not _is_storable(cartridge_id):
            return None
        rows = self._rows(sql.select(_cartridges).where(_cartridges.c.cartridge_id == cartridge_id))
        return _of_row(rows[0]) if rows else None

    def lookup_by_label(self, key: str, value: str) -> list[Registration]:
        """Those that carry the label, in the order of registration. Any text is a key, and means itself."""
        if not (_is_storable(key) and _is_storable(value)):
            return []
        return self._read(sql.select(_cartridges).join(_labels).where(_labels.c.key == key, _labels.c.value == value))

    def ids_by_label(self, key: str, value: str) -> list[str]:
        """Only their ids."""
        if not (_is_storable(key) and _is_storable(value)):
            return []
        ids = sql.select(_cartridges.c.cartridge_id).join(_labels)
        rows = self._rows(_in_order(ids.where(_labels.c.key == key, _labels.c.value == value)))
        return [row.cartridge_id for row in rows]

    def lookup_by_model(self, model_id: str) -> list[Registration]:
        """Those made for the model of exactly this id, in the order of registration."""
        if not _is_storable(model_id):
            return []
        return self._read(sql.select(_cartridges).where(_cartridges.c.model_id == model_id))

    def list_all(self) -> list[Registration]:
        """All that this version can read, in the order of registration."""
        return self._read(sql.select(_cartridges))

    def ids(self) -> list[str]:
        """The ids of all, also of those that this version cannot read."""
        return [row.cartridge_id for row in self._rows(_in_order(sql.select(_cartridges.c.cartridge_id)))]

    def count(self) -> int:
        """How many."""
        return int(self._rows(sql.select(sql.func.count()).select_from(_cartridges))[0][0])

    def version(self) -> int:
        """A number that every change of whatever process raises; cheap enough to ask for on each request."""
        return int(self._rows(sql.select(_registry.c.version))[0][0])

    # -- closing -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close all connections. From then on everything raises `StoreError`."""
        self._is_closed = True
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- transactions ------------------------------------------------------------------------------------------------

    def _read(self, query: sql.Select[Any]) -> list[Registration]:
        found = []
        for row in self._rows(_in_order(query)):
            try:
                found.append(_of_row(row))
            except InvalidCartridge as error:
                told = (row.cartridge_id, row.registered_us)
                if told not in self._told:
                    self._told.add(told)
                    log.warning("left out of what the registry %s holds: %s (%s)", self.name, error, error.hint)
        return found

    def _rows(self, query: sql.Select[Any]) -> list[sql.Row[Any]]:
        try:
            with self._translating(), self._engine.connect() as connection:
                return list(connection.execute(query))
        except StoreError as error:
            if not getattr(error.__cause__, "connection_invalidated", False):
                raise
        # A connection of the pool was cut, say by a restart of the server; the pool has made new ones since.
        with self._translating(), self._engine.connect() as connection:
            return list(connection.execute(query))

    @contextmanager
    def _writing(self) -> Iterator[tuple[sql.Connection, int]]:
        """One transaction, alone; yields the version that it makes."""
        self.version()  # mends a cut connection, which a write must not retry
        raise_version = sql.update(_registry).values(version=_registry.c.version + 1).returning(_registry.c.version)
        with self._translating(), self._engine.begin() as connection:
            yield connection, int(connection.execute(raise_version).scalar_one())

    def _prepare(self) -> None:
        with self._translating():
            if not sql.inspect(self._engine).has_table(_registry.name):
                self._create()
        found = [row.schema for row in self._rows(sql.select(_registry.c.schema))]
        if found != [SCHEMA]:
            raise StoreError(
                f"{self.name} is a registry of version {', '.join(map(str, found))}, expected {SCHEMA}",
                hint="use the kvist that made it, or another file",
            )

    def _create(self) -> None:
        with self._engine.connect() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(sql.select(sql.func.pg_advisory_xact_lock(_CREATING)))
            else:
                connection.exec_driver_sql("ROLLBACK")
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            _tables.create_all(connection)
            if connection.execute(sql.select(sql.func.count()).select_from(_registry)).scalar_one() == 0:
                connection.execute(sql.insert(_registry).values(id=1, schema=SCHEMA, version=0))
            connection.commit()

    @contextmanager
    def _translating(self) -> Iterator[None]:
        """Errors of the database, as ours."""
        if self._is_closed:
            raise StoreError(f"the registry {self.name} is closed")
        try:
            yield
        except exc.SQLAlchemyError as error:
            reason = getattr(error, "orig", None) or error
            raise StoreError(f"the registry {self.name} failed: {reason}".strip()) from error


# -- rows ------------------------------------------------------------------------------------------------------------


def _in_order(query: sql.Select[Any]) -> sql.Select[Any]:
    return query.order_by(_cartridges.c.place, _cartridges.c.cartridge_id)


def _registration(
    cartridge_id: str, location: str, manifest: CartridgeManifest, size: int, registered_us: int
) -> Registration:
    at = _EPOCH + timedelta(microseconds=registered_us)
    return Registration(cartridge_id=cartridge_id, location=location, manifest=manifest, size=size, registered_at=at)


def _of_row(row: sql.Row[Any]) -> Registration:
    try:
        manifest = CartridgeManifest.from_json(row.manifest)
    except InvalidCartridge as error:
        raise InvalidCartridge(
            f"cartridge {row.cartridge_id} is registered with a manifest that cannot be read: {error}",
            hint=f"to take it out: kvist cartridge remove {row.cartridge_id}",
        ) from error
    return _registration(row.cartridge_id, row.location, manifest, row.size, row.registered_us)


def _check_location(location: str) -> None:
    _check_text(location, "location", 1 << 16)
    if location.startswith("{"):
        try:
            source = json.loads(location)
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"expected a location to be an absolute path or a JSON object: {error}") from None
        if isinstance(source, Mapping):
            return
    if not Path(location).is_absolute():
        raise InvalidInput(f"expected a location to be an absolute path, for every process, got {location!r:.200}")


def _check_text(text: str, what: str, limit: int) -> None:
    if not _is_storable(text):
        raise InvalidInput(f"{what}: expected text without NUL, in UTF-8, got {text!r:.80}")
    if len(text.encode()) > limit:
        raise InvalidInput(f"{what}: expected at most {limit} bytes, got {len(text.encode())}")


def _is_storable(text: str) -> bool:
    """Whether every database holds it as it is: PostgreSQL has no NUL, and neither has lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text
