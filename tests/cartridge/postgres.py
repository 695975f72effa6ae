"""A PostgreSQL server for tests: the one of KVIST_POSTGRES_URL, else one of our own from the binaries of a package."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sql

URL = "KVIST_POSTGRES_URL"
HOW = f"set {URL} to a server where databases may be made, or install the package `postgresql`"


@contextmanager
def server() -> Iterator[sql.URL]:
    """Url of a server that is up; a test of which none can be had is skipped."""
    pytest.importorskip("psycopg", reason="pip install 'kvist[postgres]'")
    if URL in os.environ:
        yield sql.make_url(os.environ[URL]).set(drivername="postgresql+psycopg")
        return
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    on_path = shutil.which("initdb")
    if not found and on_path is None:
        pytest.skip(f"there is no PostgreSQL: {HOW}")
    binaries = found[-1] if found else Path(on_path or "").parent
    with tempfile.TemporaryDirectory(prefix="kvist-pg-") as directory:
        yield from _started(binaries, Path(directory))


def _started(binaries: Path, directory: Path) -> Iterator[sql.URL]:
    user = "nobody" if os.geteuid() == 0 else None  # it refuses to run as root
    if user is not None:
        shutil.chown(directory, user)
    data = directory / "data"
    made = [binaries / "initdb", "-D", data, "-U", "kvist", "-A", "trust", "--no-locale", "-E", "UTF8", "--no-sync"]
    subprocess.run(made, user=user, cwd=directory, check=True, capture_output=True)
    # a socket in the directory: no port that another might have
    options = ["-c", "listen_addresses=", "-c", "fsync=off", "-k", directory]
    with (directory / "log").open("wb") as log:
        running = subprocess.Popen(
            [binaries / "postgres", "-D", data, *options], user=user, cwd=directory, stdout=log, stderr=log
        )
    try:
        while subprocess.run([binaries / "pg_isready", "-q", "-h", directory], check=False).returncode:
            assert running.poll() is None, (directory / "log").read_text()
        yield sql.URL.create(
            "postgresql+psycopg", username="kvist", database="postgres", query={"host": str(directory)}
        )
    finally:
        running.send_signal(signal.SIGINT)
        running.wait()


@contextmanager
def database(at: sql.URL) -> Iterator[str]:
    """Url of an empty database, which is dropped."""
    name = f"kvist_{uuid.uuid4().hex[:12]}"
    engine = sql.create_engine(at, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        yield at.set(database=name).render_as_string(hide_password=False)
        with engine.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        engine.dispose()
