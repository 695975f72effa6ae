"""The config of a repository, ``kvist.json``: what it is called, how it names pages, and what it may hold.

Knows one record and its two versions. Must not know what else lies in a repository.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Self

from kvist.errors import InvalidInput, InvalidManifest
from kvist.hashing import DIGESTS, Buffer, block_salt, keyed_digest
from kvist.ids import ALGORITHMS
from kvist.repo import record
from kvist.store import Quota

CONFIG: Final = "kvist.json"
CONFIG_MAX: Final = 65536
"""Most bytes that it may have."""

_FORMAT: Final = "kvist-repository"
_NO_QUOTA: Final = Quota()
_SALT: Final = re.compile(r"[0-9a-f]{64}")
_QUOTA: Final = {"bytes": "max_bytes", "snapshots": "max_snapshots"}


@dataclass(frozen=True, slots=True, repr=False)
class RepositoryConfig:
    """What ``kvist.json`` says.

    Attributes:
        id: made at `Repository.init`.
        page_digest: the algorithm that names pages.
        salt: 32 bytes in hex, a secret of all who may read the repository; ``""``: it has none. Digests of pages are
            keyed by it, and block hashes salted: so neither tells who else has the same content.
        quota: the only part that ever changes.
    """

    id: str
    page_digest: str = "blake3"
    salt: str = ""
    quota: Quota = _NO_QUOTA

    def __post_init__(self) -> None:
        if self.page_digest not in ALGORITHMS:
            raise InvalidInput(f"page digest must be one of {', '.join(ALGORITHMS)}, got {self.page_digest!r:.80}")
        if self.salt and not _SALT.fullmatch(self.salt):
            raise InvalidInput("the salt of a repository is 64 lower-case hex digits")  # and is not told

    def __repr__(self) -> str:
        return f"RepositoryConfig({self.id!r}, {self.page_identity!r}, {self.quota!r})"

    @property
    def digest(self) -> Callable[[Buffer], bytes]:
        """Names pages."""
        return keyed_digest(self.page_digest, bytes.fromhex(self.salt)) if self.salt else DIGESTS[self.page_digest]

    @property
    def page_identity(self) -> str:
        """Equal where equal pages have equal digests; tells nothing of the salt."""
        if not self.salt:
            return self.page_digest
        told = hashlib.sha256(b"kvist salt id v1\0" + bytes.fromhex(self.salt)).hexdigest()
        return f"{self.page_digest}+{told[:12]}"

    @property
    def block_salt(self) -> str:
        """Of the block hashes of whatever is computed for this repository alone; ``""``: none."""
        return block_salt(bytes.fromhex(self.salt)) if self.salt else ""

    def encode(self) -> bytes:
        """The bytes of ``kvist.json``. With a salt it is version 2, which older readers refuse: they would take every
        page for a damaged one."""
        quota = {key: value for key, name in _QUOTA.items() if (value := getattr(self.quota, name)) is not None}
        document = {"format": _FORMAT, "version": 2 if self.salt else 1, "id": self.id, "page_digest": self.page_digest}
        more = {"salt": self.salt, "quota": quota}
        return record.encode(CONFIG, document | {name: value for name, value in more.items() if value})

    @classmethod
    def decode(cls, data: bytes, where: str) -> Self:
        """Read ``kvist.json``.

        Args:
            data: its bytes.
            where: the store, for messages.

        Raises:
            InvalidManifest: it cannot be read, or not by this version.
        """
        if len(data) > CONFIG_MAX:
            raise InvalidManifest(f"{where}: {CONFIG} has more than {CONFIG_MAX} bytes")
        try:
            config = record.decode(CONFIG, data)
        except InvalidManifest as error:
            raise InvalidManifest(f"{where}: {error}") from None
        version = config.get("version")
        if config.get("format") != _FORMAT or type(version) is not int or version not in (1, 2):
            raise InvalidManifest(
                f"{where}: expected a {_FORMAT} of version 1 or 2, "
                f"got {config.get('format')!r:.80} of version {version!r:.80}"
            )
        salt, quota = config.get("salt", ""), config.get("quota", {})
        if not isinstance(config.get("id"), str) or not isinstance(salt, str) or bool(salt) != (version == 2):
            raise InvalidManifest(f"{where}: {CONFIG} lacks an id, or has a salt that does not go with its version")
        if not isinstance(quota, dict) or not quota.keys() <= _QUOTA.keys():
            raise InvalidManifest(f"{where}: {CONFIG} has a quota that this version does not know: {quota!r:.200}")
        try:
            limits = Quota(**{_QUOTA[key]: value for key, value in quota.items()})
            return cls(config["id"], str(config.get("page_digest")), salt, limits)
        except InvalidInput as error:
            raise InvalidManifest(f"{where}: {CONFIG}: {error}") from None
