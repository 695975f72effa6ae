"""Artifacts: the two JSON documents of an OCI image layout that say what lies under a tag. Reads and writes no file.

Knows the OCI image specification 1.1 (image-layout.md, manifest.md, "Guidelines for Artifact Usage"). Must not know
files or locks. An artifact of ours has a layer for each object of a store, titled by the object's key.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from kvist.errors import IntegrityError, StoreError
from kvist.store.base import ObjectInfo, is_key

ARTIFACT_TYPE: Final = "application/vnd.kvist.repository.v1"
LAYOUT: Final = b'{"imageLayoutVersion":"1.0.0"}'
"""The content of the file ``oci-layout``."""
EMPTY: Final = b"{}"
"""The config of an artifact that needs none."""
TAG: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")

_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
_INDEX: Final = "application/vnd.oci.image.index.v1+json"
_EMPTY_TYPE: Final = "application/vnd.oci.empty.v1+json"
_LAYER: Final = "application/vnd.kvist.object.v1"
_NAME: Final = "org.opencontainers.image.ref.name"
_TITLE: Final = "org.opencontainers.image.title"
_CREATED: Final = "org.opencontainers.image.created"
_DIGEST: Final = re.compile(r"sha256:([0-9a-f]{64})")


def hex_of(data: bytes) -> str:
    """The SHA-256 of ``data``, in hex: the name of its blob."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, slots=True)
class Layer:
    """One object.

    Attributes:
        blob: SHA-256 of its bytes, in hex.
        size: bytes.
        created: when it was put; RFC 3339, UTC, to the microsecond.
    """

    blob: str
    size: int
    created: str

    @classmethod
    def new(cls, blob: str, size: int) -> Layer:
        """One that is put now."""
        return cls(blob, size, datetime.now(UTC).isoformat(timespec="microseconds"))

    @property
    def etag(self) -> str:
        """Differs where bytes or time differ."""
        return f"{self.blob[:32]}-{self.created}"

    def info(self, key: str) -> ObjectInfo:
        """What a store tells of it."""
        return ObjectInfo(key, self.size, datetime.fromisoformat(self.created).timestamp(), self.etag)


Tree = Mapping[str, Layer]
"""Layers by key."""


def encode_manifest(tree: Tree) -> bytes:
    """The image manifest of an artifact with these layers."""
    layers = [
        _descriptor(_LAYER, tree[key].blob, tree[key].size)
        | {"annotations": {_TITLE: key, _CREATED: tree[key].created}}
        for key in sorted(tree)
    ]
    return _encode(
        {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "artifactType": ARTIFACT_TYPE,
            "config": _descriptor(_EMPTY_TYPE, hex_of(EMPTY), len(EMPTY)),
            # the specification asks for one layer at least
            "layers": layers or [_descriptor(_EMPTY_TYPE, hex_of(EMPTY), len(EMPTY))],
        }
    )


def decode_manifest(data: bytes, where: str) -> Tree:
    """Read an image manifest.

    Raises:
        StoreError: it is not one of ours.
        IntegrityError: it is, and makes no sense.
    """
    document = parse(data, where)
    if document.get("artifactType") != ARTIFACT_TYPE:
        raise StoreError(f"{where} is no kvist repository: its artifact type is {document.get('artifactType')!r:.120}")
    try:
        layers = [one for one in document["layers"] if one["mediaType"] != _EMPTY_TYPE]
        return {_checked_key(one): _layer(one) for one in layers}
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{where} has a layer that cannot be read: {error!r:.200}") from None


def find(index: Mapping[str, Any], tag: str) -> str | None:
    """The blob of the manifest under ``tag``, or ``None``."""
    for one in _descriptors(index):
        if one.get("annotations", {}).get(_NAME) == tag:
            found = _DIGEST.fullmatch(str(one.get("digest")))
            if found is None:
                raise IntegrityError(f"the tag {tag} names {one.get('digest')!r:.120}, which is no SHA-256 digest")
            return found[1]
    return None


def encode_index(index: Mapping[str, Any], tag: str, blob: str, size: int) -> bytes:
    """``index`` with the manifest ``blob`` under ``tag``; whatever else it says stays."""
    others = [one for one in _descriptors(index) if one.get("annotations", {}).get(_NAME) != tag]
    ours = _descriptor(_MANIFEST, blob, size) | {"artifactType": ARTIFACT_TYPE, "annotations": {_NAME: tag}}
    return _encode({"schemaVersion": 2, "mediaType": _INDEX, **index, "manifests": [*others, ours]})


def blobs_in(document: Any) -> Iterator[str]:
    """Every blob that a manifest or an index names, ours or not."""
    if isinstance(document, dict):
        found = _DIGEST.fullmatch(str(document.get("digest")))
        if found is not None:
            yield found[1]
        for value in document.values():
            yield from blobs_in(value)
    elif isinstance(document, list):
        for value in document:
            yield from blobs_in(value)


def parse(data: bytes, where: str) -> dict[str, Any]:
    """Read one JSON object.

    Raises:
        IntegrityError: it is none.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{where} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise IntegrityError(f"{where} is no JSON object")
    return document


def _descriptors(index: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = index.get("manifests", [])
    if not isinstance(found, list) or not all(
        isinstance(one, dict) and isinstance(one.get("annotations", {}), dict) for one in found
    ):
        raise IntegrityError("index.json lists manifests in a form that the OCI image layout does not know")
    return found


def _layer(one: Mapping[str, Any]) -> Layer:
    digest, created = _DIGEST.fullmatch(one["digest"]), one["annotations"][_CREATED]
    if digest is None or type(one["size"]) is not int or one["size"] < 0:
        raise ValueError(one["digest"], one["size"])
    if datetime.fromisoformat(created).tzinfo is None:
        raise ValueError(created)
    return Layer(digest[1], one["size"], created)


def _checked_key(one: Mapping[str, Any]) -> str:
    key = one["annotations"][_TITLE]
    if not (isinstance(key, str) and is_key(key)):
        raise ValueError(key)
    return key


def _descriptor(media_type: str, blob: str, size: int) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": f"sha256:{blob}", "size": size}


def _encode(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
