"""A tier in Redis or Valkey: pages that several machines share, in memory. The only door to redis-py.

What to keep when memory is full is the server's to decide (``maxmemory`` and ``maxmemory-policy allkeys-lru``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kvist.errors import StoreError
from kvist.hashing import Buffer
from kvist.repo.tier.base import Clock, PageTier

PREFIX: Final = "kvist:page:"
TIMEOUT_S: Final = 0.5
USERNAME: Final = "KVIST_REDIS_USERNAME"
PASSWORD: Final = "KVIST_REDIS_PASSWORD"
"""Environment variables with the credentials, if the server asks for some."""


class RedisTier(PageTier):
    """Pages as values of ``kvist:page:<digest>``. A batch is one round trip; a dead server costs one time-out."""

    def __init__(
        self,
        host: str,
        port: int = 6379,
        db: int = 0,
        *,
        ttl: int | None = None,
        tls: bool = False,
        timeout: float = TIMEOUT_S,
        clock: Clock = time.monotonic,
    ) -> None:
        """Connect when it is first used.

        Args:
            host: name or address of the server.
            port: its port.
            db: number of the database.
            ttl: seconds after which a page goes, from when it was last written; ``None``: never by itself.
            tls: whether to speak TLS.
            timeout: seconds to wait for a connection, and for each answer.
            clock: see `PageTier`.
        """
        super().__init__(clock=clock)
        where = f"[{host}]" if ":" in host else host
        given = {"ttl": ttl, "timeout": f"{timeout:g}" if timeout != TIMEOUT_S else None}
        query = "&".join(f"{name}={value}" for name, value in given.items() if value is not None)
        self._url = f"redis{'s' * tls}://{where}:{port}/{db}" + ("?" + query if query else "")
        self._ttl = ttl
        self._client: Any = redis.Redis(
            host=host,
            port=port,
            db=db,
            ssl=tls,
            username=os.environ.get(USERNAME),
            password=os.environ.get(PASSWORD),
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            # one more try, for a connection that the server has closed meanwhile; none after a time-out
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
        )

    @property
    def url(self) -> str:
        """``redis://host:port/db`` or ``rediss://…``, with ``?ttl=`` and ``timeout=`` where these were given."""
        return self._url

    def _read(self, names: Sequence[str], outs: Sequence[memoryview]) -> list[bool]:
        with self._translated():
            values: list[bytes | None] = self._client.mget([PREFIX + name for name in names])
        found = []
        for value, out in zip(values, outs, strict=True):
            is_here = value is not None and len(value) == len(out)
            if value is not None and is_here:
                out[:] = value
            found.append(is_here)
        return found

    def _write(self, items: Sequence[tuple[str, Buffer]]) -> list[str]:
        with self._translated(), self._client.pipeline(transaction=False) as pipeline:
            for name, data in items:
                pipeline.set(PREFIX + name, data, ex=self._ttl)
            pipeline.execute()
        return [name for name, _ in items]

    def _forget(self, names: Sequence[str]) -> None:
        with self._translated():
            self._client.unlink(*(PREFIX + name for name in names))

    def close(self) -> None:
        """Close all connections. Idempotent."""
        self._client.close()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except redis.RedisError as error:
            raise StoreError(f"{type(error).__name__}: {error}") from error
