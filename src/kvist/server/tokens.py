"""Tokens: who may call a server, how far, for which tenant, and until when. Knows one JSON file; must not know HTTP.

A token is ``kvist_`` and 32 random bytes as text. The file holds their SHA-256, so that reading it gives nobody a
token; of 256 random bits no slow hash is needed. It is read anew when it has changed, and where it cannot be read, or
others could have written it, nobody is let in: a token that was removed must not come back through a damaged file.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from kvist.errors import AlreadyExists, InvalidInput, InvalidName, KvistError, NotFound, StoreError, Unauthorized
from kvist.ids import check_name
from kvist.store.posix import exclusive

log = logging.getLogger("kvist.server")

PREFIX: Final = "kvist_"
"""What every token begins with, so that one that leaks is recognised."""
FILE: Final = "KVIST_TOKENS"
"""The environment variable that names the file."""

_FILE_MAX: Final = 16 << 20
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TENANT_MAX: Final = 64


class Scope(IntEnum):
    """How far a token reaches; each includes those before it. ``OPEN`` asks for none, and no token has it."""

    OPEN = 0
    READ = 1
    WRITE = 2
    ADMIN = 3

    @property
    def text(self) -> str:
        """As the tokens file and messages write it."""
        return self.name.lower()

    @classmethod
    def parse(cls, text: str) -> Scope:
        """A scope that a token can have.

        Raises:
            InvalidInput: it is none.
        """
        for scope in (cls.READ, cls.WRITE, cls.ADMIN):
            if scope.text == text:
                return scope
        raise InvalidInput(f"a scope is read, write or admin, got {text!r:.80}")


def check_tenant(name: object) -> str:
    """Return ``name`` if it may name a tenant: one segment of a name (see `check_name`), of at most 64 characters.

    Raises:
        InvalidName: otherwise. So a tenant's repository lies right below ``tenants/`` and nowhere else.
    """
    text = check_name(name)
    if "/" in text or len(text) > _TENANT_MAX:
        raise InvalidName(f"a tenant's name is one segment of at most {_TENANT_MAX} characters, got {text!r:.120}")
    return text


@dataclass(frozen=True, slots=True)
class Grant:
    """Who calls, and what it may do.

    Attributes:
        id: of its token; ``""``: none was asked for.
        scope: how far it reaches.
        tenant: whose repository it sees; ``None``: the server's own.
    """

    id: str = ""
    scope: Scope = Scope.ADMIN
    tenant: str | None = None


class Token(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One entry of the file.

    Attributes:
        id: what it is called, in lists and logs.
        digest: SHA-256 of its text.
        scope: ``read``, ``write`` or ``admin``.
        tenant: the only one whose repository it reaches.
        expires: seconds since the epoch from which on it does not count.
        note: for people.
    """

    id: str
    digest: Annotated[str, Meta(pattern="^sha256:[0-9a-f]{64}$")]
    scope: Literal["read", "write", "admin"]
    tenant: str | None = None
    expires: Annotated[int, Meta(ge=0)] | None = None
    note: str = ""


class _File(Struct, forbid_unknown_fields=True):
    format: Literal["kvist-tokens"]
    version: Literal[1]
    tokens: list[Token]


class Tokens:
    """The tokens of one file, as it is now. Thread-safe."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        """Read the file.

        Raises:
            NotFound: there is none.
            InvalidInput: it is no tokens file, or others can change it.
        """
        self.path: Final = path
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: tuple[int, ...] = ()
        self._tokens: tuple[tuple[bytes, Token], ...] = ()
        self._refresh()

    def grant_of(self, text: str) -> Grant:
        """What the token ``text`` allows; raises as `find`."""
        return self.find(digest_of(text))

    def find(self, digest: bytes) -> Grant:
        """What the token of this digest allows.

        Raises:
            Unauthorized: it is not in the file, or has expired; the message does not tell which.
            StoreError: the file cannot be read any more.
        """
        try:
            tokens = self._refresh()
        except KvistError as error:
            raise closed(error) from None
        found: Token | None = None
        for known, token in tokens:  # all of them, so that the time tells nothing
            found = token if secrets.compare_digest(known, digest) else found
        if found is None or (found.expires is not None and found.expires <= self._clock()):
            raise Unauthorized("the token is unknown, or has expired")
        return Grant(found.id, Scope.parse(found.scope), found.tenant)

    @property
    def tenants(self) -> frozenset[str]:
        """Those that a token names."""
        return frozenset(token.tenant for _, token in self._tokens if token.tenant is not None)

    def _refresh(self) -> tuple[tuple[bytes, Token], ...]:
        with self._lock:
            try:
                info = self.path.stat()
            except OSError as error:
                raise _unreadable(self.path, error) from None
            seen = (info.st_mtime_ns, info.st_size, info.st_ino, info.st_mode, info.st_uid, info.st_ctime_ns)
            if seen == self._seen:
                return self._tokens
            self._seen, self._tokens = (), ()
            self._tokens = tuple((bytes.fromhex(token.digest[7:]), token) for token in read_tokens(self.path))
            self._seen = seen
            return self._tokens

    def __repr__(self) -> str:
        return f"Tokens({str(self.path)!r})"


def digest_of(text: str) -> bytes:
    """What is kept of a token."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def closed(error: KvistError) -> StoreError:
    """What a caller is told where the tokens file cannot be used; why, which names a path, is for the log."""
    log.error("nobody can be let in: %s", error)
    return StoreError("nobody can be let in", hint="the server's log says why")


def read_tokens(path: Path) -> list[Token]:
    """The entries of a tokens file.

    Raises:
        NotFound: there is none.
        InvalidInput: it is no tokens file, two entries have one id or token, or others can change it.
    """
    try:
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            data = file.read(_FILE_MAX + 1)
    except OSError as error:
        raise _unreadable(path, error) from None
    if stat.S_IMODE(info.st_mode) & 0o022:
        raise InvalidInput(
            f"others can change the tokens file {path}: its mode is {stat.S_IMODE(info.st_mode):o}",
            hint=f"chmod 600 {path}",
        )
    if info.st_uid not in (0, os.geteuid()):
        raise InvalidInput(f"the tokens file {path} belongs to user {info.st_uid}, who can change it: expected our own")
    if len(data) > _FILE_MAX:
        raise InvalidInput(f"the tokens file {path} has more than {_FILE_MAX} bytes")
    try:
        tokens = msgspec.json.decode(data, type=_File).tokens
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"{path} is no tokens file: {error}", hint="kvist token add --help") from None
    for token in tokens:
        _check(token)
    for name in ("id", "digest"):
        values = [getattr(token, name) for token in tokens]
        if len(set(values)) != len(values):
            raise InvalidInput(f"the tokens file {path} has two tokens of one {name}")
    return tokens


def add_token(
    path: Path, token_id: str, scope: Scope, *, tenant: str | None = None, expires: int | None = None, note: str = ""
) -> str:
    """Make a token and put it into the file, which is made if there is none; its text, which is nowhere else.

    Raises:
        AlreadyExists: there is one of that id.
        InvalidInput: a name that is not allowed, or see `read_tokens`.
    """
    text = PREFIX + secrets.token_urlsafe(32)
    digest = f"sha256:{digest_of(text).hex()}"
    token = Token(token_id, digest, scope.text, tenant, expires, note)  # type: ignore[arg-type]
    _check(token)
    with _editing(path) as tokens:
        if any(other.id == token_id for other in tokens):
            raise AlreadyExists(f"there is a token {token_id!r} in {path}", hint="remove it, or choose another id")
        tokens.append(token)
    return text


def remove_token(path: Path, token_id: str) -> None:
    """Take a token out of the file; who has it is let in no more.

    Raises:
        NotFound: there is none of that id.
    """
    with _editing(path) as tokens:
        kept = [token for token in tokens if token.id != token_id]
        if len(kept) == len(tokens):
            raise NotFound(f"there is no token {token_id!r:.120} in {path}", hint="kvist token list")
        tokens[:] = kept


@contextmanager
def _editing(path: Path) -> Iterator[list[Token]]:
    """The entries, to be changed; written back whole, for us alone to read, while nobody else edits them."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path.with_name(path.name + ".lock")):
            tokens = read_tokens(path) if path.exists() else []
            yield tokens
            document = _File("kvist-tokens", 1, tokens)
            data = msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"
            fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # made with mode 600
            temporary = Path(name)
            try:
                with os.fdopen(fd, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(fd)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InvalidInput(f"cannot write the tokens file {path}: {error.strerror}") from None


def _check(token: Token) -> None:
    if not _ID.fullmatch(token.id):
        raise InvalidName(f"a token's id has up to 64 letters, digits and '._-', got {token.id!r:.120}")
    if token.tenant is not None:
        check_tenant(token.tenant)
    if token.expires is not None and token.expires >= 2**53:
        raise InvalidInput(f"token {token.id}: expires is no time: {token.expires}")


def _unreadable(path: Path, error: OSError) -> KvistError:
    if isinstance(error, FileNotFoundError):
        return NotFound(f"there is no tokens file {path}", hint=f"kvist token add ID --tokens {path}")
    return InvalidInput(f"cannot read the tokens file {path}: {error.strerror}")
