"""Snapshot records: an immutable statement that some manifests belong together, where they came from, and why.

Knows one small JSON document. Must not know pages or storage.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

from kvist.errors import InvalidInput, InvalidManifest
from kvist.hashing import sha256_cid
from kvist.ids import parse_cid
from kvist.repo.manifest import Manifest, canonical_json, parse_json

_KIND: Final = "kvist-snapshot"
_KEYS: Final = frozenset(
    {"kind", "version", "manifests", "parents", "tokens", "name", "message", "created_ns", "nonce"}
)
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
MESSAGE_MAX: Final = 10_000
"""Longest message, in characters."""
SNAPSHOT_MAX: Final = 16 << 20
"""Most bytes of a record that is read."""


@dataclass(frozen=True)
class Snapshot:
    """One snapshot.

    Attributes:
        manifests: cids of its manifests, one for each group of layers of each tensor-parallel rank, ascending by
            rank, then by group.
        parents: cids of the snapshots it continues; the first is the main line.
        tokens: tokens whose KV it holds: of the manifest that holds most, since each rank and group holds its part of
            the same tokens.
        name: what its maker called it, or ``None``. Not a ref: names are not unique.
        message: free text.
        created_ns: nanoseconds since the epoch, by its maker's clock.
        nonce: tells forks of one parent, made in one moment, apart; ``""`` elsewhere.
    """

    manifests: tuple[str, ...]
    parents: tuple[str, ...] = ()
    tokens: int = 0
    name: str | None = None
    message: str = ""
    created_ns: int = 0
    nonce: str = ""

    def __post_init__(self) -> None:
        if not self.manifests:
            raise InvalidInput("a snapshot holds at least one manifest")
        for cid in (*self.manifests, *self.parents):
            parse_cid(cid)
        if len(set(self.parents)) != len(self.parents):
            raise InvalidInput("a snapshot names each parent once")
        for number in (self.tokens, self.created_ns):
            if type(number) is not int or not 0 <= number < 2**63:
                raise InvalidInput(f"snapshot tokens and created_ns must be in [0, 2^63), got {number!r}")
        for text in ("" if self.name is None else self.name, self.message, self.nonce):
            if not isinstance(text, str) or len(text) > MESSAGE_MAX or _SURROGATE.search(text):
                raise InvalidInput(
                    f"snapshot texts have at most {MESSAGE_MAX} characters, none a surrogate, got {text!r:.80}"
                )

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read the canonical bytes.

        Raises:
            InvalidManifest: anything but the canonical encoding of a valid record.
        """
        document = parse_json(data, "snapshot")
        if document.get("kind") != _KIND or document.get("version") != 1:
            raise InvalidManifest(
                f"snapshot: expected kind {_KIND!r} version 1, got {document.get('kind')!r:.80} "
                f"version {document.get('version')!r:.80}"
            )
        if document.keys() != _KEYS:
            raise InvalidManifest(f"snapshot: expected the keys {sorted(_KEYS)}, got {sorted(document)!r:.300}")
        for name in ("manifests", "parents"):
            if not isinstance(document[name], list):
                raise InvalidManifest(f"snapshot: {name} must be an array, got {document[name]!r:.80}")
            document[name] = tuple(document[name])
        del document["kind"], document["version"]
        try:
            snapshot = cls(**document)
            same = snapshot.encode() == data
        except (InvalidInput, TypeError) as error:
            raise InvalidManifest(f"snapshot: {error}") from None
        if not same:
            raise InvalidManifest("snapshot: not in the canonical encoding (docs/spec/repository.md)")
        return snapshot

    def encode(self) -> bytes:
        """The canonical bytes."""
        return canonical_json(
            {
                "kind": _KIND,
                "version": 1,
                "manifests": self.manifests,
                "parents": self.parents,
                "tokens": self.tokens,
                "name": self.name,
                "message": self.message,
                "created_ns": self.created_ns,
                "nonce": self.nonce,
            }
        )

    @functools.cached_property
    def cid(self) -> str:
        """``sha256:`` of the canonical bytes; the name by which it is checked out."""
        return sha256_cid(self.encode())


def check_parts(manifests: Sequence[Manifest]) -> None:
    """Refuse manifests that are not the parts of one cache in their order. Some of the parts may be missing.

    Raises:
        InvalidInput: not ascending by rank, then by group; two of one rank and group; or they disagree on how many
            ranks or groups there are.
    """
    layouts = [manifest.layout for manifest in manifests]
    places = [(layout.tp_rank, layout.group) for layout in layouts]
    if any(left >= right for left, right in itertools.pairwise(places)):
        raise InvalidInput(
            f"the manifests of a snapshot must ascend by rank, then by group, each pair once; got {places!r:.200}"
        )
    for name in ("tp_size", "n_groups"):
        values = sorted({getattr(layout, name) for layout in layouts})
        if len(values) > 1:
            raise InvalidInput(f"the manifests of a snapshot must agree on {name}, got {values}")
