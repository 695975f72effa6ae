"""What makes a manifest valid. Knows the fields of `kvist.cartridge.manifest`; must not know files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from kvist.cartridge.model import DTYPES, MAX_NESTING, nesting
from kvist.errors import InvalidCartridge, InvalidInput
from kvist.ids import check_name
from kvist.repo.manifest import canonical_json

if TYPE_CHECKING:
    from kvist.cartridge.manifest import CartridgeManifest

SCHEMA_VERSION: Final = 1
"""Of documents that we write. 0 is the sidecar of vLLM's first CartridgeConnector, which names no files."""

_HEX: Final = re.compile(r"[0-9a-f]{64}")
_FILE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.safetensors")
_KINDS: Final = ("cartridge", "reasoncache", "kv_prefix")
_TEXTS: Final = ("source_format", "kv_layout", "checksum", "created_at", "source_document", "license")
_POSITIVE: Final = ("num_layers", "num_kv_heads", "head_dim", "block_size")
_COUNTS: Final = (
    *_POSITIVE,
    *("num_tokens_raw", "num_tokens_aligned", "num_blocks", "num_frozen_tokens"),
    *("file_size_bytes", "training_steps", "first_position"),
)


def align_to_block_size(tokens: int, block_size: int) -> int:
    """Tokens of ``tokens`` that fill blocks of ``block_size``.

    Raises:
        InvalidInput: fewer than no tokens, or a block of none.
    """
    if tokens < 0 or block_size < 1:
        raise InvalidInput(f"expected tokens >= 0 and a block size >= 1, got {tokens} and {block_size}")
    return tokens - tokens % block_size


def check_manifest(manifest: CartridgeManifest) -> None:
    """Check every rule; those of our own schema unless it is version 0.

    Raises:
        InvalidCartridge: with the first one that is broken.
    """
    _check_types(manifest)
    _check_sums(manifest)
    if manifest.schema_version:
        _check_own(manifest)


def _check_types(manifest: CartridgeManifest) -> None:
    if type(manifest.schema_version) is not int or manifest.schema_version not in (0, SCHEMA_VERSION):
        raise InvalidCartridge(
            f"manifest: schema_version must be {SCHEMA_VERSION}, got {manifest.schema_version!r:.80}"
        )
    for name in _COUNTS:
        count, least = getattr(manifest, name), 1 if name in _POSITIVE else 0
        if type(count) is not int or not least <= count < 2**63:
            raise InvalidCartridge(f"manifest: {name} must be an integer in [{least}, 2^63), got {count!r:.80}")
    for name in ("cartridge_id", "model_id", *_TEXTS):
        _text(getattr(manifest, name), name, at_least=1 if name.endswith("_id") else 0)
    for name in ("model_revision", "tokenizer_hash", "chat_template_hash"):
        if getattr(manifest, name) is not None:
            _text(getattr(manifest, name), name, at_least=1)
    for name in ("model_id", "model_revision", "tokenizer_hash"):
        text = getattr(manifest, name)
        if text is not None and not text.isprintable():  # or it could name no `ModelIdentity`
            raise InvalidCartridge(f"manifest: {name} must be printable text, got {text!r:.80}")
    for name in ("has_frozen_prefix", "has_token_ids"):
        if type(getattr(manifest, name)) is not bool:
            raise InvalidCartridge(f"manifest: {name} must be true or false, got {getattr(manifest, name)!r:.80}")
    if manifest.resource_kind not in _KINDS:
        raise InvalidCartridge(
            f"manifest: resource_kind must be one of {', '.join(_KINDS)}, got {manifest.resource_kind!r:.80}"
        )
    if not isinstance(manifest.labels, Mapping):
        raise InvalidCartridge(f"manifest: labels must be an object of texts, got {manifest.labels!r:.80}")
    for key, value in manifest.labels.items():
        _text(key, "a label's key")
        _text(value, f"label {key!r:.80}")
    for name in ("rope", "provenance"):
        _check_json(getattr(manifest, name), name)


def _check_sums(manifest: CartridgeManifest) -> None:
    aligned = align_to_block_size(manifest.num_tokens_raw, manifest.block_size)
    sums = {
        "num_tokens_aligned": aligned,
        "num_blocks": aligned // manifest.block_size,
    }
    for name, expected in sums.items():
        if getattr(manifest, name) != expected:
            raise InvalidCartridge(
                f"manifest: {name} must be {expected} for {manifest.num_tokens_raw} tokens in blocks of "
                f"{manifest.block_size}, got {getattr(manifest, name)}"
            )
    if manifest.num_frozen_tokens > manifest.num_tokens_raw:
        raise InvalidCartridge(
            f"manifest: num_frozen_tokens is {manifest.num_frozen_tokens}, of {manifest.num_tokens_raw} tokens"
        )


def _check_own(manifest: CartridgeManifest) -> None:
    """What only our own schema promises."""
    try:
        check_name(manifest.cartridge_id)
    except InvalidInput as error:
        raise InvalidCartridge(f"manifest: cartridge_id: {error}") from None
    if manifest.dtype not in DTYPES:
        raise InvalidCartridge(f"manifest: dtype must be one of {', '.join(DTYPES)}, got {manifest.dtype!r:.80}")
    if manifest.kv_layout != "THD":
        raise InvalidCartridge(f"manifest: kv_layout must be 'THD', got {manifest.kv_layout!r:.80}")
    if manifest.num_tokens_raw < 1:
        raise InvalidCartridge("manifest: a cartridge holds at least one token, got num_tokens_raw 0")
    if manifest.has_frozen_prefix != (manifest.num_frozen_tokens > 0):
        raise InvalidCartridge(
            f"manifest: has_frozen_prefix is {manifest.has_frozen_prefix}, "
            f"with {manifest.num_frozen_tokens} frozen tokens"
        )
    if manifest.has_token_ids and (manifest.training_steps or manifest.first_position):
        raise InvalidCartridge(
            "manifest: token ids are those of an untrained prefill from position 0, got "
            f"training_steps {manifest.training_steps} and first_position {manifest.first_position}"
        )
    if not _HEX.fullmatch(manifest.checksum):
        raise InvalidCartridge(f"manifest: checksum must be 64 lower-case hex digits, got {manifest.checksum!r:.80}")
    if not isinstance(manifest.layers, tuple) or len(manifest.layers) != manifest.num_layers:
        raise InvalidCartridge(f"manifest: layers must be {manifest.num_layers} shapes, got {len(manifest.layers)}")
    for shape in manifest.layers:
        for name in ("num_kv_heads", "head_dim"):
            count = getattr(shape, name)
            if type(count) is not int or not 0 < count < 2**31:
                raise InvalidCartridge(f"manifest: a layer's {name} must be an integer in [1, 2^31), got {count!r:.80}")
    first = manifest.layers[0]
    if (first.num_kv_heads, first.head_dim) != (manifest.num_kv_heads, manifest.head_dim):
        raise InvalidCartridge(
            f"manifest: num_kv_heads and head_dim are {manifest.num_kv_heads} and {manifest.head_dim}, "
            f"the first layer has {first.num_kv_heads} and {first.head_dim}"
        )
    _check_rope(manifest.rope)
    _check_files(manifest)


def _check_rope(rope: Mapping[str, Any]) -> None:
    """As `canonical_rope` makes it: it is in the identity, and one rotation has one spelling."""
    parts = list(rope.values())
    for part in parts if parts and all(isinstance(part, Mapping) for part in parts) else [rope]:
        for name, value in part.items():
            items = value if isinstance(value, list) else [value]
            if not all(isinstance(item, bool | float | str) for item in items):
                raise InvalidCartridge(
                    f"manifest: rope's {name!r:.80} must be text, true, false, a float (10000.0, not 10000) or a list "
                    f"of these, got {value!r:.80}"
                )


def _check_files(manifest: CartridgeManifest) -> None:
    names = [entry.name for entry in manifest.files]
    for entry in manifest.files:
        if not (isinstance(entry.name, str) and _FILE.fullmatch(entry.name)):
            raise InvalidCartridge(
                f"manifest: a file's name must be plain and end in .safetensors, got {entry.name!r:.80}"
            )
        if type(entry.size) is not int or not 0 < entry.size < 2**63:
            raise InvalidCartridge(
                f"manifest: the size of {entry.name} must be a positive integer, got {entry.size!r:.80}"
            )
        if not (isinstance(entry.sha256, str) and _HEX.fullmatch(entry.sha256)):
            raise InvalidCartridge(
                f"manifest: the sha256 of {entry.name} must be 64 lower-case hex digits, got {entry.sha256!r:.80}"
            )
    if names != sorted(set(names)):
        raise InvalidCartridge(f"manifest: files must be in the order of their names, each once, got {names!r:.200}")
    if manifest.file_size_bytes != (total := sum(entry.size for entry in manifest.files)):
        raise InvalidCartridge(f"manifest: file_size_bytes is {manifest.file_size_bytes}, the files have {total}")


def _check_json(value: object, name: str) -> None:
    """Refuse what would come back different: number keys, tuples, NaN; and what is too deep to be walked."""
    if not isinstance(value, Mapping):
        raise InvalidCartridge(f"manifest: {name} must be an object, got {value!r:.80}")
    if (depth := nesting(value)) > MAX_NESTING:
        raise InvalidCartridge(
            f"manifest: {name}: expected at most {MAX_NESTING} objects and arrays in one another, got {depth}"
        )
    try:
        same = json.loads(canonical_json(value)) == value
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidCartridge(f"manifest: {name} cannot be written as JSON: {error}") from None
    if not same:
        raise InvalidCartridge(f"manifest: {name} does not read back from JSON as it was; use text keys, and lists")


def _text(value: object, name: str, at_least: int = 0) -> None:
    if not isinstance(value, str) or len(value) < at_least:
        raise InvalidCartridge(f"manifest: {name} must be text, got {value!r:.80}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidCartridge(f"manifest: {name} must be text that has a UTF-8 form, got {value!r:.80}") from None
