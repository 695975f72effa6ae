"""Signatures: who vouches for a snapshot. Ed25519 over its cid; knows keys and one small record.

A cid is a digest of the snapshot, which names its manifests by theirs, which name their pages by theirs. So a signature
of a cid vouches for every byte that a checkout of it brings into an engine; not for the snapshots that it continues.

Private keys are PKCS8 PEM files that nobody else can read, with a passphrase if there is one. A public key is one line
of text, ``ed25519 <base64> <name>``; a file of such lines says whom to trust. Its id is the SHA-256 of its 32 bytes.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from kvist.errors import AlreadyExists, IntegrityError, InvalidInput, InvalidManifest, NotFound, UntrustedSnapshot
from kvist.ids import digest_hex, parse_cid, short
from kvist.repo import record
from kvist.store import Store

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

PREFIX: Final = "signatures/"
PASSPHRASE: Final = "KVIST_KEY_PASSPHRASE"
"""The environment variable that holds the passphrase of private keys."""

_DOMAIN: Final = b"kvist snapshot signature v1\0"
_KIND: Final = "kvist-signature"
_LINE: Final = re.compile(r"ed25519[ \t]+([A-Za-z0-9+/]{43}=)(?:[ \t]+(\S.*))?")
_FILE_MAX: Final = 1 << 20
_RECORD_MAX: Final = 4096


def signature_prefix(cid: str) -> str:
    """Below which the signatures of a snapshot lie, each under the id of its key."""
    return f"{PREFIX}{digest_hex(parse_cid(cid))}/"


@dataclass(frozen=True, slots=True)
class PublicKey:
    """Whose signatures can be checked.

    Attributes:
        raw: its 32 bytes.
        name: what people call it; not part of it.
    """

    raw: bytes
    name: str = ""

    @property
    def id(self) -> str:
        """SHA-256 of its bytes, in hex."""
        return hashlib.sha256(self.raw).hexdigest()

    @classmethod
    def parse(cls, line: str) -> Self:
        """Read one line of text, as `encode` writes it.

        Raises:
            InvalidInput: it is no such line.
        """
        found = _LINE.fullmatch(line.strip())
        try:
            raw = base64.b64decode(found[1], validate=True) if found is not None else b""
        except binascii.Error:
            raw = b""
        if found is None or len(raw) != 32:
            raise InvalidInput(f"expected a public key 'ed25519 <base64 of 32 bytes> <name>', got {line!r:.120}")
        return cls(raw, found[2] or "")

    def encode(self) -> str:
        """The key as one line."""
        return f"ed25519 {base64.b64encode(self.raw).decode()} {self.name}".rstrip()

    def has_signed(self, cid: str, signature: bytes) -> bool:
        """Whether ``signature`` is this key's, of this snapshot."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, _message(cid))
        except (InvalidSignature, ValueError):
            return False
        return True


class PrivateKey:
    """What signs. It is never printed: its text is that of its public key.

    Attributes:
        public: checks its signatures.
    """

    def __init__(self, key: Ed25519PrivateKey, name: str = "") -> None:
        self._key = key
        self.public: Final = PublicKey(key.public_key().public_bytes_raw(), name)

    @classmethod
    def new(cls, name: str = "") -> Self:
        """A new key."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return cls(Ed25519PrivateKey.generate(), name)

    @classmethod
    def load(cls, path: Path, passphrase: str | None = None) -> Self:
        """Read a private key.

        Args:
            path: a PEM file that only its owner can read.
            passphrase: default that in the environment (`PASSPHRASE`), if the key has one.

        Raises:
            NotFound: there is no such file.
            InvalidInput: others can read it, it is no Ed25519 key, or its passphrase is missing or another.
        """
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        data, mode = _read(path)
        if mode & 0o077:
            raise InvalidInput(
                f"others can read the private key {path}: expected mode 600, got {stat.S_IMODE(mode):o}",
                hint=f"chmod 600 {path}; make a new key if somebody may have read it",
            )
        secret = os.environ.get(PASSPHRASE) if passphrase is None else passphrase
        is_encrypted = b"ENCRYPTED" in data
        if is_encrypted and not secret:
            raise InvalidInput(f"the private key {path} has a passphrase", hint=f"give it in {PASSPHRASE}")
        try:
            key = load_pem_private_key(data, secret.encode() if is_encrypted and secret else None)
        except (ValueError, TypeError, UnsupportedAlgorithm):  # their text may tell of the key
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise InvalidInput(f"{path} is no Ed25519 private key in PKCS8 PEM, or has another passphrase")
        return cls(key)

    def save(self, path: Path, passphrase: str | None = None) -> None:
        """Write the key where nobody else can read it, encrypted if there is a passphrase (default: `PASSPHRASE`).

        Raises:
            AlreadyExists: there is such a file.
        """
        from cryptography.hazmat.primitives import serialization

        secret = os.environ.get(PASSPHRASE) if passphrase is None else passphrase
        data = self._key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(secret.encode()) if secret else serialization.NoEncryption(),
        )
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise AlreadyExists(f"{path} exists; a key is never replaced") from None
        except OSError as error:
            raise InvalidInput(f"cannot write {path}: {error.strerror}") from None
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)

    def sign(self, cid: str) -> bytes:
        """The signature of a snapshot."""
        return self._key.sign(_message(cid))

    def __repr__(self) -> str:
        return f"PrivateKey({self.public!r})"


@dataclass(frozen=True, slots=True)
class Trust:
    """A policy: a snapshot must be signed by one of these.

    Attributes:
        keys: at least one.
        source: where they were read, for messages.
    """

    keys: tuple[PublicKey, ...]
    source: str = "the trusted keys"

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file of public keys, one a line; empty lines and those that begin with ``#`` are passed over.

        Raises:
            NotFound: there is no such file.
            InvalidInput: a line is no key, or there is none; others than its owner can change it.
        """
        import cryptography  # noqa: F401 - missing, it must be missed now and not at the first checkout

        data, mode = _read(path)
        if mode & 0o022:
            raise InvalidInput(f"others can change {path}, which says whom to trust", hint=f"chmod go-w {path}")
        try:
            lines = [line.strip() for line in data.decode().splitlines()]
        except UnicodeDecodeError:
            raise InvalidInput(f"{path} is no text: expected public keys, one a line") from None
        keys = tuple(PublicKey.parse(line) for line in lines if line and not line.startswith("#"))
        if not keys:
            raise InvalidInput(f"{path} holds no public key, so that nothing would be trusted")
        return cls(keys, str(path))

    def require(self, store: Store, cid: str) -> PublicKey:
        """The trusted key that signed a snapshot of the repository in ``store``.

        Raises:
            UntrustedSnapshot: none has.
        """
        wrong = []
        for key in self.keys:
            signature = _signature(store, cid, key.id)
            if signature is not None and key.has_signed(cid, signature):
                return key
            wrong += [key.id] if signature is not None else []
        if wrong:
            reason = f"its signature by {wrong[0][:16]} does not verify"
        else:
            others = [name[:16] for name in signers(store, cid)]
            reason = f"it is signed by {', '.join(others[:5])} only" if others else "nobody has signed it"
        raise UntrustedSnapshot(
            f"snapshot {cid} is not trusted: expected a signature by one of {len(self.keys)} keys of {self.source}, "
            f"and {reason}",
            hint=f"kvist sign {short(cid)} --key FILE",
        )


def sign(store: Store, cid: str, key: PrivateKey) -> str:
    """Sign a snapshot of the repository in ``store``; the key of the signature there. Idempotent."""
    where = signature_prefix(cid) + key.public.id
    document = {"kind": _KIND, "version": 1, "cid": cid, "key": key.public.id, "signature": key.sign(cid).hex()}
    store.put(where, record.encode(where, document))
    return where


def signers(store: Store, cid: str) -> list[str]:
    """Ids of the keys that say that they signed a snapshot; nothing is verified."""
    prefix = signature_prefix(cid)
    return [info.key.removeprefix(prefix) for info in store.list(prefix)]


def _signature(store: Store, cid: str, key_id: str) -> bytes | None:
    """What a key left for a snapshot; ``None``: nothing, ``b""``: nothing that can be read."""
    where = signature_prefix(cid) + key_id
    try:
        document = record.decode(where, store.get(where, size=_RECORD_MAX))
        return bytes.fromhex(str(document.get("signature")))
    except NotFound:
        return None
    except (InvalidManifest, IntegrityError, ValueError):
        return b""


def _message(cid: str) -> bytes:
    """What is signed: no other protocol signs the like."""
    return _DOMAIN + bytes.fromhex(digest_hex(parse_cid(cid)))


def _read(path: Path) -> tuple[bytes, int]:
    """A small file and its mode, which is of what was read."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(_FILE_MAX + 1)
    except FileNotFoundError:
        raise NotFound(f"there is no file {path}") from None
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from None
    if len(data) > _FILE_MAX:
        raise InvalidInput(f"{path} has more than {_FILE_MAX} bytes: expected a key, or a list of keys")
    return data, mode
