"""Servers that page tiers need, real ones on this machine: Redis, and Mooncake's master."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from kvist.errors import EngineError
from kvist.testing.processes import free_port

REDIS: Final = shutil.which("redis-server") or shutil.which("valkey-server")
"""Path of the server, or ``None``."""
MOONCAKE: Final = Path(sys.executable).with_name("mooncake_master")
"""Where its wheel would put it."""


@contextlib.contextmanager
def redis_server(*options: str, port: int | None = None) -> Iterator[int]:
    """A Redis or Valkey that keeps nothing on disk; its port."""
    assert REDIS is not None
    port = free_port() if port is None else port
    with tempfile.TemporaryDirectory(prefix="kvist-redis-") as directory:
        command = [REDIS, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", directory, *options]
        with _running(command, port):
            yield port


@contextlib.contextmanager
def mooncake_master() -> Iterator[int]:
    """A Mooncake master; its port."""
    port = free_port()
    with _running([str(MOONCAKE), f"--rpc_port={port}", f"--metrics_port={free_port()}"], port):
        yield port


@contextlib.contextmanager
def _running(command: Sequence[str], port: int) -> Iterator[None]:
    """A process, once its port takes connections, until the end of the block."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while not _is_open(port):
                if process.poll() is not None:
                    log.seek(0)
                    raise EngineError(f"{command[0]} ended with {process.returncode}: {log.read()[-2000:]!r}")
                time.sleep(0.02)
            yield
        finally:
            process.kill()
            process.wait()


def _is_open(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
