"""Every error kvist raises on purpose, as one tree.

    KvistError
    ├── InvalidInput            the caller's argument cannot be right
    │   ├── InvalidName         a ref, sequence or object name that is not allowed
    │   ├── InvalidManifest     bytes that are not a canonical or known manifest, snapshot or config
    │   └── InvalidCartridge    files that are no cartridge, or a checkpoint that cannot become one
    │       └── UnsafeCheckpoint    to read it would run code
    ├── NotFound                the named thing is not there
    │   ├── RepositoryNotFound
    │   ├── PrunedSnapshot      its record is kept, its pages are not
    │   └── UnknownCartridge    no cartridge is registered by that id
    ├── AlreadyExists           create-only, and it is there
    ├── Conflict                somebody else changed it first, or holds it
    │   └── Locked
    ├── AccessDenied            who asks may not have it
    │   ├── Unauthorized        it brought no token, or one that does not count
    │   ├── Forbidden           its token does not reach so far
    │   └── UntrustedSnapshot   no trusted key signed the snapshot
    ├── LayoutMismatch          pages of one layout offered to an engine of another
    ├── PageNameMismatch        pages named in one way offered to a repository that names them in another
    ├── IntegrityError          stored bytes are not what their name says
    │   ├── DamagedPage
    │   ├── MissingPage
    │   ├── DamagedObject
    │   └── DamagedCartridge
    ├── StoreError              the storage below refused
    │   └── StoreFull
    └── EngineError             the engine cannot do it now, or at all
        ├── PoolExhausted
        ├── ResidencyFull
        └── UnsupportedModel

Handlers match on the class; programs that read our output match on ``kind``, whose values never change meaning.
The message says what was expected and what came; ``hint`` is the command that mends it.
"""

from __future__ import annotations

from typing import ClassVar


class KvistError(Exception):
    """Root of the tree.

    Attributes:
        kind: stable identifier for programs, e.g. ``"damaged_page"``.
        exit_code: what the command line returns for it.
        hint: a command or act that mends it, or ``None``.
    """

    kind: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class InvalidInput(KvistError):
    """An argument that cannot be right whatever the state."""

    kind = "invalid_input"
    exit_code = 2


class InvalidName(InvalidInput):
    """A ref, sequence or object name that is not allowed."""

    kind = "invalid_name"


class InvalidManifest(InvalidInput):
    """Bytes that are not a manifest, snapshot or repository config we can trust."""

    kind = "invalid_manifest"
    exit_code = 20


class InvalidCartridge(InvalidInput):
    """Files that are no cartridge we can trust, or a checkpoint that cannot become one."""

    kind = "invalid_cartridge"
    exit_code = 20


class UnsafeCheckpoint(InvalidCartridge):
    """A checkpoint that cannot be read without running code from it; nothing of it was run."""

    kind = "unsafe_checkpoint"


class NotFound(KvistError):
    """The named thing does not exist."""

    kind = "not_found"
    exit_code = 4


class RepositoryNotFound(NotFound):
    """The store holds no kvist repository."""

    kind = "repository_not_found"
    exit_code = 10


class PrunedSnapshot(NotFound):
    """A snapshot of which prune has left the record only."""

    kind = "pruned_snapshot"


class UnknownCartridge(NotFound):
    """No cartridge is configured or registered by that id."""

    kind = "unknown_cartridge"


class AlreadyExists(KvistError):
    """A create-only write met an existing object."""

    kind = "already_exists"
    exit_code = 5


class Conflict(KvistError):
    """Another writer was first; read again and retry."""

    kind = "conflict"
    exit_code = 11


class Locked(Conflict):
    """Another process holds what this operation needs alone."""

    kind = "locked"


class AccessDenied(KvistError):
    """Who asks may not have what it asks for."""

    kind = "access_denied"
    exit_code = 13


class Unauthorized(AccessDenied):
    """A token is needed, and none came, or one that is unknown or has expired."""

    kind = "unauthorized"


class Forbidden(AccessDenied):
    """The caller is known, or nobody asks who it is, and what it asks for is not allowed to it."""

    kind = "forbidden"


class UntrustedSnapshot(AccessDenied):
    """A policy asks for a signature, and no trusted key has signed the snapshot."""

    kind = "untrusted_snapshot"


class LayoutMismatch(KvistError):
    """Pages made under one layout were offered to an engine with another."""

    kind = "layout_mismatch"
    exit_code = 12


class PageNameMismatch(KvistError):
    """Two repositories name the same page differently: by another digest algorithm, or with another salt."""

    kind = "page_name_mismatch"
    exit_code = 12


class IntegrityError(KvistError):
    """Stored bytes are not what their name promises."""

    kind = "integrity"
    exit_code = 20


class DamagedPage(IntegrityError):
    """A page whose bytes do not hash to its digest; the next put of the same content heals it."""

    kind = "damaged_page"


class MissingPage(IntegrityError):
    """A page that a manifest names and no segment holds."""

    kind = "missing_page"


class DamagedObject(IntegrityError):
    """A manifest, snapshot or segment whose bytes do not hash to its name."""

    kind = "damaged_object"


class DamagedCartridge(IntegrityError):
    """A cartridge's file whose bytes are not those that its manifest names, or that holds numbers that are none."""

    kind = "damaged_cartridge"


class StoreError(KvistError):
    """The storage below refused an operation."""

    kind = "store"
    exit_code = 30


class StoreFull(StoreError):
    """No space is left (or a quota is reached); nothing half-written stays visible."""

    kind = "store_full"


class EngineError(KvistError):
    """The engine cannot do what was asked."""

    kind = "engine"
    exit_code = 40


class PoolExhausted(EngineError):
    """The engine's pool has too few free slots; retry when sequences have ended."""

    kind = "pool_exhausted"


class ResidencyFull(EngineError):
    """What is resident is in use, and leaves no room; retry when requests have ended, or give it more."""

    kind = "residency_full"


class CartridgeTooLarge(ResidencyFull):
    """It is larger than all the memory that there is for cartridges; only another configuration helps."""

    kind = "cartridge_too_large"


class CartridgeNotReady(EngineError):
    """It is being fetched or converted, or looked for; retry in a moment."""

    kind = "cartridge_not_ready"


class UnsupportedModel(EngineError):
    """A model whose cache this engine cannot page; it is named, never approximated."""

    kind = "unsupported_model"
