"""A cartridge's manifest, ``cartridge.json``: what it is, for which model, and the digests of its files.

Knows one JSON document (docs/spec/cartridge.md). Must not know torch, directories or registries.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from kvist.cartridge.model import ModelIdentity
from kvist.cartridge.rules import SCHEMA_VERSION as SCHEMA_VERSION
from kvist.cartridge.rules import align_to_block_size as align_to_block_size
from kvist.cartridge.rules import check_manifest
from kvist.errors import InvalidCartridge, InvalidManifest, LayoutMismatch
from kvist.repo.manifest import canonical_json, parse_json

_Part = TypeVar("_Part", "LayerShape", "FileEntry")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """One layer's keys, and its values, are ``[tokens, num_kv_heads, head_dim]``."""

    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file beside the manifest: its plain name, its size in bytes, and the SHA-256 of it in hex."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class CartridgeManifest:
    """What one cartridge is. Construction checks every rule.

    The names are those of the sidecar manifests of vLLM's first CartridgeConnector, and some that these lack.

    Attributes:
        cartridge_id: a name by `kvist.ids.check_name`.
        model_id, model_revision, num_layers, num_kv_heads, head_dim, dtype, rope, tokenizer_hash: see `ModelIdentity`.
        chat_template_hash: ``sha256:`` of the chat template that framed the text, or ``None``.
        num_tokens_raw: tokens that it holds, frozen ones included: all of them are used.
        num_tokens_aligned, num_blocks, block_size: tokens in full blocks of a size, for engines that take only these.
        has_frozen_prefix, num_frozen_tokens: first tokens that training did not change.
        resource_kind: ``cartridge``, ``reasoncache`` or ``kv_prefix``.
        source_format: what it was made from.
        kv_layout: axes of each tensor; ``"THD"``: tokens, heads, head dimension.
        checksum: SHA-256 over the digests of all its tensors, however these are spread over files.
        file_size_bytes: of all files together.
        created_at: ISO 8601, UTC.
        training_steps: 0 for keys and values that were not trained, or of which it is not known.
        source_document: where its text came from.
        labels: by which routers find it.
        schema_version: see `SCHEMA_VERSION`.
        first_position: position of its first token; keys are rotated by it.
        layers: shape of each layer; the first has ``num_kv_heads`` and ``head_dim``.
        files: by name; empty for a cartridge that was not saved yet.
        has_token_ids: it holds its document's token ids, and is the lossless prefill of these.
        provenance: how it was made, and how well it does; JSON.
        license: of its content, as an SPDX expression; ``""``: unknown.

    Raises:
        InvalidCartridge: a value of the wrong type or out of range, or values that contradict each other.
    """

    cartridge_id: str
    model_id: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    num_tokens_raw: int
    num_tokens_aligned: int
    block_size: int
    num_blocks: int
    has_frozen_prefix: bool
    num_frozen_tokens: int = 0
    resource_kind: str = "cartridge"
    source_format: str = "trainable_cache"
    kv_layout: str = "THD"
    checksum: str = ""
    file_size_bytes: int = 0
    created_at: str = ""
    training_steps: int = 0
    source_document: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION
    model_revision: str | None = None
    tokenizer_hash: str | None = None
    chat_template_hash: str | None = None
    rope: Mapping[str, Any] = field(default_factory=dict)
    first_position: int = 0
    layers: tuple[LayerShape, ...] = ()
    files: tuple[FileEntry, ...] = ()
    has_token_ids: bool = False
    provenance: Mapping[str, Any] = field(default_factory=dict)
    license: str = ""

    def __post_init__(self) -> None:
        check_manifest(self)

    @functools.cached_property
    def identity(self) -> str:
        """SHA-256 in hex over what decides the keys and values and who may use them.

        Equal for two cartridges with the same content for the same model, whatever they are called and however their
        files are cut. It goes into the block hashes of every request that uses the cartridge.
        """
        document = {
            "checksum": self.checksum,
            "model_id": self.model_id,
            "model_revision": self.model_revision,
            "dtype": self.dtype,
            "num_tokens": self.num_tokens_raw,
            "layers": [[shape.num_kv_heads, shape.head_dim] for shape in self.layers],
            "rope": dict(self.rope),
            "first_position": self.first_position,
        }
        return hashlib.sha256(b"kvist cartridge identity v1\0" + canonical_json(document)).hexdigest()

    @property
    def model(self) -> ModelIdentity:
        """The model that it is for. Only for manifests with a known dtype."""
        return ModelIdentity(
            model_id=self.model_id,
            revision=self.model_revision,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            rope=self.rope,
            tokenizer_hash=self.tokenizer_hash,
        )

    @property
    def origin(self) -> str:
        """How its keys and values came to be, in words: what is known of it, and no more."""
        if self.training_steps:
            return f"trained in {self.training_steps:,} steps"
        return "as a prefill computes them" if self.has_token_ids else f"from {self.source_format or 'unknown'}"

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON has them; the caller's own."""
        document: dict[str, Any] = json.loads(canonical_json(dataclasses.asdict(self)))
        return document

    def to_json(self) -> str:
        """The document: keys sorted, indented by two spaces."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], *, lenient: bool = False) -> Self:
        """Read a parsed document.

        Args:
            document: of JSON values.
            lenient: it is a sidecar manifest of vLLM's first CartridgeConnector: unknown keys are passed over, ours
                are not looked for, and the result has schema version 0.

        Raises:
            InvalidCartridge: unknown keys (unless lenient), missing ones, or values that construction refuses.
        """
        if not isinstance(document, Mapping):
            raise InvalidCartridge(f"manifest: expected an object, got {type(document).__name__}")
        known = {f.name: f for f in dataclasses.fields(cls)}
        version = document.get("schema_version")
        if not lenient and (type(version) is not int or version != SCHEMA_VERSION):
            raise InvalidCartridge(
                f"manifest: expected schema_version {SCHEMA_VERSION}, got {version!r:.80}",
                hint="a sidecar manifest of another project: `kvist cartridge import`" if version is None else None,
            )
        if not lenient and (unknown := sorted(str(key) for key in document if key not in known)):
            raise InvalidCartridge(f"manifest: unknown keys {unknown!r:.200}")
        required = {name for name, f in known.items() if f.default is f.default_factory is dataclasses.MISSING}
        if not lenient:
            required |= {"checksum", "layers", "files"}
        if missing := sorted(required - set(document)):
            raise InvalidCartridge(f"manifest: keys missing: {', '.join(missing)}")
        if lenient:
            return cls(**{**_defaults_of_sidecar(document), "schema_version": 0})
        return cls(
            **{
                **document,
                "layers": tuple(_part(LayerShape, item, "layers") for item in _list(document["layers"], "layers")),
                "files": tuple(_part(FileEntry, item, "files") for item in _list(document["files"], "files")),
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes, *, lenient: bool = False) -> Self:
        """Read a document; see `from_dict`.

        Raises:
            InvalidCartridge: as there; and text that is not one JSON object without duplicate keys.
        """
        try:
            document = parse_json(text.encode() if isinstance(text, str) else text, "manifest")
        except (InvalidManifest, UnicodeEncodeError) as error:
            raise InvalidCartridge(str(error)) from None
        return cls.from_dict(document, lenient=lenient)

    def validate_against_model(self, model: ModelIdentity) -> list[str]:
        """Why it does not fit a model, one line a mismatch with both values; empty where it fits.

        A revision, tokenizer or rotary embedding that one side does not know is not compared. Of names only the last
        component is, unless two known revisions differ: a directory and a repository of the same model fit.
        """
        pinned_apart = None not in (self.model_revision, model.revision) and self.model_revision != model.revision
        mine, theirs = self.model_id, model.model_id
        if not pinned_apart:
            mine, theirs = (text.rstrip("/").rpartition("/")[2] for text in (mine, theirs))
        same_name = mine == theirs
        pairs: list[tuple[str, Any, Any]] = [] if same_name else [("model_id", self.model_id, model.model_id)]
        if pinned_apart:
            pairs.append(("model_revision", self.model_revision, model.revision))
        shapes = ("num_layers", "num_kv_heads", "head_dim")
        names = shapes if self.dtype == "unknown" else (*shapes, "dtype")
        pairs.extend((name, getattr(self, name), getattr(model, name)) for name in names)
        if self.rope and model.rope:
            mine, theirs = (canonical_json(rope).decode() for rope in (self.rope, model.rope))  # true is no 1.0
            pairs.append(("rope", mine, theirs))
        if self.tokenizer_hash and model.tokenizer_hash:
            pairs.append(("tokenizer_hash", self.tokenizer_hash, model.tokenizer_hash))
        return [f"{name}: the cartridge has {a!r}, the model {b!r}" for name, a, b in pairs if a != b]

    def validate_against_block_size(self, block_size: int) -> list[str]:
        """Why its aligned counts are not those of an engine with this block size; empty where they are."""
        if self.block_size == block_size:
            return []
        return [f"block_size: the cartridge has {self.block_size}, the engine {block_size}"]

    def require(self, model: ModelIdentity) -> None:
        """Refuse a model that it does not fit.

        Raises:
            LayoutMismatch: with every line of `validate_against_model`.
        """
        if mismatches := self.validate_against_model(model):
            raise LayoutMismatch(
                f"cartridge {self.cartridge_id!r} is not for this model: {'; '.join(mismatches)}",
                hint="serve the model it was made with, or make it anew: `kvist cartridge build`",
            )


def _list(value: object, name: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise InvalidCartridge(f"manifest: {name} must be an array, got {value!r:.80}")
    return value


def _part(kind: type[_Part], value: object, name: str) -> _Part:
    wanted = {f.name for f in dataclasses.fields(kind)}
    if not isinstance(value, Mapping) or set(value) != wanted:
        raise InvalidCartridge(
            f"manifest: each of {name} must have the keys {', '.join(sorted(wanted))}, got {value!r:.80}"
        )
    return kind(**value)


def _defaults_of_sidecar(document: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the original sidecar, of which some writers left one or the other out."""
    ours = {"schema_version", "model_revision", "tokenizer_hash", "chat_template_hash", "rope", "first_position"}
    ours |= {"layers", "files", "has_token_ids", "provenance", "license"}
    names = {f.name for f in dataclasses.fields(CartridgeManifest)} - ours
    return {name: document[name] for name in names if name in document}
