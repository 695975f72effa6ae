"""Tenants: an application for each, over its own repository, chosen by who calls.

Knows grants and applications; must not know routes or engines.

Isolation is by construction. An application sees one repository, one owner's view of the engine, and what it remembers
itself; it is never told of another tenant, so it cannot mix two up. A tenant's repository is the store's part below
``tenants/<name>``, with a salt of its own: so its digests and block hashes are like nobody else's, and neither a shared
page tier nor the engine's prefix cache tells it, by a hit, what another tenant has.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from contextlib import suppress
from typing import Final
from weakref import WeakValueDictionary

from anyio import to_thread
from starlette.types import ASGIApp, Receive, Scope, Send

from kvist.errors import AlreadyExists, KvistError, NotFound, RepositoryNotFound, StoreError
from kvist.repo import Repository
from kvist.server.errors import Envelope, envelope, error_response
from kvist.server.tokens import Grant, check_tenant
from kvist.store import PrefixStore, ReadOnlyStore, Store
from kvist.store.quota import TENANTS

log = logging.getLogger("kvist.server")


def open_tenant(store: Store, name: str, open_repository: Callable[[Store], Repository]) -> Repository:
    """Open the repository of a tenant of the server's store; it is made, with a new salt, if there is none.

    Args:
        store: the server's.
        name: the tenant's.
        open_repository: opens one, as the server's own was opened.

    Raises:
        InvalidName: no tenant is called so.
        NotFound: there is none, and the store is read only.
        StoreError: somebody made one without a salt there.
    """
    own = PrefixStore(store, TENANTS + check_tenant(name))
    try:
        repo = open_repository(own)
    except RepositoryNotFound:
        if isinstance(store, ReadOnlyStore):
            raise NotFound(
                f"tenant {name} has no repository yet", hint="its first request to a server that writes makes it"
            ) from None
        with suppress(AlreadyExists):  # another process was first
            Repository.init(own, salt=secrets.token_hex(32)).close()
        repo = open_repository(own)
    if not repo.config.salt:
        repo.close()
        raise StoreError(
            f"the repository of tenant {name} has no salt: others could tell what it holds",
            hint=f"move it away, and kvist init --salted --store {own.url}",
        )
    return repo


class TenantApps:
    """ASGI application behind a `kvist.server.access.Guard`: passes each request to its tenant's."""

    def __init__(self, default: ASGIApp, make: Callable[[str], ASGIApp], *, form: Envelope = envelope) -> None:
        """
        Args:
            default: for those who are of no tenant.
            make: makes the application of a tenant, once, in a thread, beside those of others; may read and write its
                repository.
            form: of errors.
        """
        self._default, self._make, self._form = default, make, form
        self._apps: Final[dict[str, ASGIApp]] = {}
        self._making: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        grant: Grant | None = scope.get("state", {}).get("grant")
        if grant is None or grant.tenant is None:
            app = self._default
        else:
            try:
                app = await self._app(grant.tenant)
            except KvistError as error:
                app = error_response(error, self._form)
        await app(scope, receive, send)

    async def _app(self, name: str) -> ASGIApp:
        if name not in self._apps:
            async with self._making.setdefault(name, asyncio.Lock()):  # made once, however many of its requests ask
                if name not in self._apps:
                    log.info("opening the repository of tenant %s", name)
                    self._apps[name] = await to_thread.run_sync(self._make, name)
        return self._apps[name]
