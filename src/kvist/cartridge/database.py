"""The databases that a registry can be in, SQLite and PostgreSQL: their urls, and how to connect. Knows no tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import sqlalchemy as sql
from sqlalchemy import exc

from kvist.errors import InvalidInput, StoreError

_BUSY_S: Final = 30.0
"""How long a writer waits for another; each holds the database for milliseconds."""
_SHOWN: Final = ("host", "port")
"""Of a url's query: the parts that say where the database is. Others may be passwords, by many names."""


def parse(url_or_path: str | Path) -> sql.URL:
    """The url of a database; see `Registry`.

    Raises:
        InvalidInput: no url, or one of another kind of database.
    """
    text = str(url_or_path)
    if not text:
        raise InvalidInput("expected the path or url of a registry, got ''")
    if "://" not in text:
        return sql.URL.create("sqlite", database=str(Path(text).expanduser().absolute()))
    try:
        url = sql.make_url(text)
        backend = url.get_backend_name()
    except (exc.ArgumentError, ValueError):
        raise InvalidInput("expected a registry's url as sqlite:///path or postgresql://user@host/database") from None
    if backend in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise InvalidInput(f"expected a registry in sqlite or postgresql, got {backend!r:.40}")
    if not url.database or url.database == ":memory:":
        raise InvalidInput("expected a registry's url to name a file: a database in memory is of one connection")
    return sql.URL.create("sqlite", database=str(Path(url.database).absolute()))


def shown(url: sql.URL) -> str:
    """The url without a password, and without what else may be secret."""
    query = {key: value for key, value in url.query.items() if key in _SHOWN}
    return url.set(query=query).render_as_string(hide_password=True)


def connect(url: sql.URL) -> sql.Engine:
    """Connections to it, made when they are used. The directory of an SQLite file is made now.

    Raises:
        InvalidInput: its driver is not installed.
        StoreError: the directory cannot be made.
    """
    if url.get_backend_name() == "postgresql":
        limits = {} if "connect_timeout" in url.query else {"connect_timeout": 10}
        try:
            return sql.create_engine(url, connect_args=limits)
        except ModuleNotFoundError:
            raise InvalidInput(
                "a registry in PostgreSQL needs the Python package psycopg, which is not installed",
                hint="pip install 'kvist[postgres]'",
            ) from None
    directory = Path(url.database or "").parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"the directory of the registry {url.database} cannot be made: {error}") from error
    engine = sql.create_engine(url, connect_args={"timeout": _BUSY_S})
    sql.event.listen(engine, "connect", _set_up_sqlite)
    sql.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return engine


def _set_up_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # or the driver begins transactions where it likes
    for pragma in ("journal_mode = WAL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}").fetchone()
