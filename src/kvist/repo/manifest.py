"""Manifests in the wire format `paged-batchinvariant-v1`: block to page digests under one layout, with the sequences.

Knows one JSON document. Must not know where pages or manifests are stored.

Written in exactly one encoding (docs/spec/manifest.md); read in that one and in the others found in the wild, which
lack everything under the ``kvist`` keys: the Rust writer's field order, the Python plugin's sorted keys with ``name``
and without ``logical_seqs``, and documents that add ``page_size_bytes``.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn, Self

from kvist.errors import InvalidInput, InvalidManifest
from kvist.hashing import sha256_cid
from kvist.ids import check_name, parse_digest
from kvist.layout import OPTIONAL, Layout

FORMAT: Final = "paged-batchinvariant-v1"
MANIFEST_MAX: Final = 256 << 20
"""Most bytes of a manifest that is read: about a million pages."""
_GEOMETRY: Final = ("page_size_tokens", "n_layers", "n_heads", "head_dim", "dtype")
_IDENTITY: Final = ("model", "revision", "memory_order", "tp_rank", "tp_size")
_FOREIGN_EXTRAS: Final = {"name", "page_size_bytes"}
_BLOCK: Final = re.compile(r"(?:[0-9a-f]{2}){4,64}")


@dataclass(frozen=True, slots=True)
class LogicalSeq:
    """One sequence: its token positions mapped onto slots.

    Attributes:
        id: stable identifier; unique within an engine; a name by `kvist.ids.check_name`.
        page_ixs: slots in token order. Two sequences may name the same slot (a shared prefix).
        fill_in_last_page: tokens in the last page whose KV is computed; 0 means it is full.
        token_ids: ids of the sequence, or ``()`` where the engine does not know them. May be *longer* than the
            cached tokens: ids that are sampled but not yet computed come last.
        state: what else the engine needs to go on (sampling parameters, generator state, prompt length), a
            JSON-serialisable mapping that only the engine interprets.
        first_page: pages before this one are not held, having left the sliding window; ``page_ixs`` starts with it.
            Not 0 only under a layout of sliding attention, and in a sequence with pages.
    """

    id: str
    page_ixs: tuple[int, ...]
    fill_in_last_page: int = 0
    token_ids: tuple[int, ...] = ()
    state: dict[str, Any] = field(default_factory=dict)
    first_page: int = 0

    def cached_tokens(self, page_size_tokens: int) -> int:
        """Tokens after which the engine goes on without computing any anew.

        Those in pages before `first_page` count too: it needs their KV no more.
        """
        if not self.page_ixs:
            return 0
        whole = self.first_page + len(self.page_ixs) - 1
        return whole * page_size_tokens + (self.fill_in_last_page or page_size_tokens)


@dataclass(frozen=True, slots=True)
class PageEntry:
    """The page of one slot.

    Attributes:
        ix: the slot it was captured from; only names the page within this manifest.
        k: digest of the K half.
        v: digest of the V half.
        block: the engine's block hash in lower-case hex, where the page is full and the engine has one.
    """

    ix: int
    k: str
    v: str
    block: str | None = None


@dataclass(frozen=True)
class Manifest:
    """What an engine's cache, or some sequences of it, held at one moment.

    Construction checks every rule and puts pages and sequences in canonical order, so that a `Manifest` is valid and
    equal content has equal bytes and one cid. Name, message and time are not part of it.

    Attributes:
        layout: the layout of every page.
        pages: by ascending ``ix``, each at most once.
        sequences: by ascending id (UTF-8 byte order), each at most once.
        numerics: what besides the layout decided the bits; compared, never interpreted.

    Raises:
        InvalidManifest: duplicate or dangling indices, a bad fill or first page, fewer token ids than cached tokens,
            bad digests, state or numerics that are not what reading their JSON gives back.
    """

    layout: Layout
    pages: tuple[PageEntry, ...] = ()
    sequences: tuple[LogicalSeq, ...] = ()
    numerics: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            for seq in self.sequences:
                check_name(seq.id)
            pages = tuple(sorted(self.pages, key=lambda page: _u32(page.ix, "page ix")))
            sequences = tuple(sorted(self.sequences, key=lambda seq: seq.id))  # ids are ASCII
            object.__setattr__(self, "pages", pages)
            object.__setattr__(self, "sequences", sequences)
            if pages and not self.layout.page_bytes:
                raise InvalidManifest(f"manifest: {len(pages)} pages under a layout whose pages hold no bytes")
            _check_pages(pages)
            _check_sequences(sequences, {page.ix for page in pages}, self.layout)
            _check_json(self.numerics, "numerics")
        except InvalidManifest:
            raise
        except InvalidInput as error:
            raise InvalidManifest(f"manifest: {error}") from None

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Self:
        """Read a manifest in any known encoding.

        Raises:
            InvalidManifest: over `MANIFEST_MAX` bytes, not JSON, duplicate or unknown keys, a wrong layout tag, values
                out of range, or a document of ours that is not in the canonical encoding.
        """
        if len(data) > MANIFEST_MAX:
            raise InvalidManifest(f"manifest: expected at most {MANIFEST_MAX} bytes, got {len(data)}")
        document = _parse(data)
        try:
            manifest = cls(**_read_document(document))
        except InvalidManifest:
            raise
        except InvalidInput as error:
            raise InvalidManifest(f"manifest: {error}") from None
        if "kvist" in document and manifest.encode() != bytes(data):
            raise InvalidManifest("manifest: not in the canonical encoding (docs/spec/manifest.md)")
        return manifest

    def encode(self) -> bytes:
        """The canonical bytes: sorted keys, no spaces, UTF-8."""
        return canonical_json(
            {
                "layout": FORMAT,
                **{name: getattr(self.layout, name) for name in _GEOMETRY},
                "pages": [_write_page(page) for page in self.pages],
                "logical_seqs": [_write_sequence(seq) for seq in self.sequences],
                "kvist": {
                    "version": 1,
                    **{name: getattr(self.layout, name) for name in _IDENTITY},
                    **self.layout.uncommon,
                    "fingerprint": self.layout.fingerprint,
                    "numerics": dict(self.numerics),
                },
            }
        )

    @functools.cached_property
    def cid(self) -> str:
        """``sha256:`` of the canonical bytes."""
        return sha256_cid(self.encode())

    @property
    def digests(self) -> Iterable[str]:
        """Digests of all page halves, K then V, in page order; a digest may come more than once."""
        for page in self.pages:
            yield page.k
            yield page.v

    @property
    def tokens(self) -> int:
        """Tokens whose KV the pages hold, each page counted once however many sequences share it, by the fullest."""
        size = self.layout.page_size_tokens
        fills: dict[int, int] = {}
        for seq in self.sequences:
            for ix in seq.page_ixs[:-1]:
                fills[ix] = size
            for ix in seq.page_ixs[-1:]:
                fills[ix] = max(fills.get(ix, 0), seq.fill_in_last_page or size)
        return sum(fills.values()) + size * (len(self.pages) - len(fills))

    def sequence(self, sequence_id: str) -> LogicalSeq | None:
        """The sequence of that id, or ``None``."""
        return next((seq for seq in self.sequences if seq.id == sequence_id), None)


def canonical_json(document: Mapping[str, Any]) -> bytes:
    """The one encoding of objects with a cid: keys sorted by code point, no spaces, UTF-8, no NaN or infinity.

    Floats are written as Python's `repr` does: the shortest digits that read back equal.
    """
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def parse_json(data: bytes | memoryview, what: str) -> dict[str, Any]:
    """Parse one JSON object strictly: UTF-8, no duplicate keys, no NaN or infinity, no half of a surrogate pair.

    Raises:
        InvalidManifest: naming ``what`` and the reason.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise InvalidManifest(f"{what}: a key occurs twice among {sorted(key for key, _ in pairs)!r:.200}")
        return found

    def no_constant(text: str) -> NoReturn:
        raise InvalidManifest(f"{what}: {text} is not a JSON number")

    def finite(text: str) -> float:
        number = float(text)
        return number if math.isfinite(number) else no_constant(text)

    try:
        text = bytes(data).decode()  # json.loads would guess UTF-16 and UTF-32, and let surrogates through
        document = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant, parse_float=finite)
        if "\\u" in text:
            canonical_json(document)  # fails on half a surrogate pair, which only an escape can hide
    except (ValueError, RecursionError) as error:
        raise InvalidManifest(f"{what}: not JSON: {error}") from None
    if not isinstance(document, dict):
        raise InvalidManifest(f"{what}: expected a JSON object, got {type(document).__name__}")
    return document


# -- checking ----------------------------------------------------------------------------------------------------


def _check_pages(pages: tuple[PageEntry, ...]) -> None:
    previous = -1
    for page in pages:
        if page.ix == previous:
            raise InvalidManifest(f"manifest: page ix {page.ix} occurs twice")
        previous = _u32(page.ix, "page ix")
        parse_digest(page.k)
        parse_digest(page.v)
        if page.block is not None and not (isinstance(page.block, str) and _BLOCK.fullmatch(page.block)):
            raise InvalidManifest(f"manifest: page {page.ix} has block hash {page.block!r:.80}, not lower-case hex")


def _check_sequences(sequences: tuple[LogicalSeq, ...], ixs: set[int], layout: Layout) -> None:
    size, previous = layout.page_size_tokens, None
    for seq in sequences:
        where = f"manifest: sequence {seq.id!r:.80}"
        if seq.id == previous:
            raise InvalidManifest(f"{where} occurs twice")
        previous = seq.id
        what = f"{where}: page ix"
        for ix in seq.page_ixs:
            _u32(ix, what)
        if len(set(seq.page_ixs)) != len(seq.page_ixs):
            raise InvalidManifest(f"{where} names a page ix twice")
        dangling = set(seq.page_ixs) - ixs
        if dangling:
            raise InvalidManifest(f"{where} names page ix {min(dangling)}, which the manifest does not hold")
        fill = _u32(seq.fill_in_last_page, f"{where}: fill_in_last_page")
        if fill >= size or (fill and not seq.page_ixs):
            raise InvalidManifest(
                f"{where}: fill_in_last_page must be below {size} (0: full) and 0 without pages, got {fill}"
            )
        first = _u32(seq.first_page, f"{where}: first_page")
        if first and not (seq.page_ixs and layout.sliding_window):
            raise InvalidManifest(
                f"{where}: first_page must be 0 without pages, and unless attention is sliding, got {first} "
                f"with {len(seq.page_ixs)} pages of {layout.attention} attention"
            )
        what = f"{where}: token id"
        for token in seq.token_ids:
            _u32(token, what)
        cached = seq.cached_tokens(size)
        if seq.token_ids and len(seq.token_ids) < cached:
            raise InvalidManifest(f"{where} has {len(seq.token_ids)} token ids for {cached} cached tokens")
        _check_json(seq.state, f"{where}: state")


def _check_json(value: Mapping[str, Any], what: str) -> None:
    """Refuse what would come back different: number keys, tuples, NaN."""
    if not isinstance(value, Mapping):
        raise InvalidManifest(f"{what} must be a mapping, got {value!r:.80}")
    if not value:
        return
    try:
        same = json.loads(canonical_json(value)) == value
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidManifest(f"{what} cannot be written as JSON: {error}") from None
    if not same:
        raise InvalidManifest(f"{what} does not read back from JSON as it was: use text keys, and lists for tuples")


def _u32(value: object, what: str) -> int:
    if type(value) is int and 0 <= value < 2**32:
        return value
    raise InvalidManifest(f"{what} must be an integer in [0, 2^32), got {value!r:.80}")


# -- the document ------------------------------------------------------------------------------------------------


def _parse(data: bytes | memoryview) -> dict[str, Any]:
    document = parse_json(data, "manifest")
    if document.get("layout") != FORMAT:
        raise InvalidManifest(f"manifest: expected layout {FORMAT!r}, got {document.get('layout')!r:.80}")
    return document


def _read_document(document: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `Manifest` from a parsed document of any known encoding."""
    ours = _object(document.get("kvist", {}), "kvist")
    is_ours = "kvist" in document
    required = {"layout", "pages", *_GEOMETRY}
    if is_ours:
        required |= {"logical_seqs", "kvist"}
        if ours.get("version") != 1:
            raise InvalidManifest(
                f"manifest: expected kvist version 1, got {ours.get('version')!r}; a newer kvist wrote it"
            )
        _keys(ours, {"version", "fingerprint", "numerics", *_IDENTITY}, set(OPTIONAL), "kvist")
    _keys(document, required, set() if is_ours else _FOREIGN_EXTRAS | {"logical_seqs"}, "the document")
    if not isinstance(document["dtype"], str):
        raise InvalidManifest(f"manifest: dtype must be text, got {document['dtype']!r:.80}")
    identity = {name: ours[name] for name in (*_IDENTITY, *OPTIONAL) if name in ours}
    layout = Layout(**{name: document[name] for name in _GEOMETRY}, **identity)
    if is_ours and ours["fingerprint"] != layout.fingerprint:
        raise InvalidManifest(
            f"manifest: expected fingerprint {layout.fingerprint} for its layout, got {ours['fingerprint']!r:.80}"
        )
    page_bytes = document.get("page_size_bytes", layout.page_bytes)
    if page_bytes != layout.page_bytes:
        raise InvalidManifest(f"manifest: page_size_bytes must be {layout.page_bytes}, got {page_bytes!r:.80}")
    return {
        "layout": layout,
        "pages": tuple(_read_page(page) for page in _list(document["pages"], "pages")),
        "sequences": tuple(_read_sequence(seq) for seq in _list(document.get("logical_seqs", []), "logical_seqs")),
        "numerics": _object(ours.get("numerics", {}), "numerics"),
    }


def _write_page(page: PageEntry) -> dict[str, Any]:
    written = {"ix": page.ix, "k": page.k, "v": page.v}
    return written | {"block": page.block} if page.block is not None else written


def _read_page(value: Any) -> PageEntry:
    page = _object(value, "a page")
    _keys(page, {"ix", "k", "v"}, {"block"}, "a page")
    return PageEntry(_u32(page["ix"], "page ix"), page["k"], page["v"], page.get("block"))


def _write_sequence(seq: LogicalSeq) -> dict[str, Any]:
    written: dict[str, Any] = {
        "id": seq.id,
        "page_ixs": seq.page_ixs,
        "fill_in_last_page": seq.fill_in_last_page,
    }
    if seq.token_ids or seq.state or seq.first_page:
        first_page = {"first_page": seq.first_page} if seq.first_page else {}
        written["kvist"] = {"token_ids": seq.token_ids, "state": seq.state, **first_page}
    return written


def _read_sequence(value: Any) -> LogicalSeq:
    seq = _object(value, "a sequence")
    _keys(seq, {"id", "page_ixs", "fill_in_last_page"}, {"kvist"}, "a sequence")
    ours = _object(seq.get("kvist", {"token_ids": [], "state": {}}), "a sequence's kvist")
    _keys(ours, {"token_ids", "state"}, {"first_page"}, "a sequence's kvist")
    return LogicalSeq(
        seq["id"],
        tuple(_u32(ix, "page_ixs") for ix in _list(seq["page_ixs"], "page_ixs")),
        seq["fill_in_last_page"],
        tuple(_list(ours["token_ids"], "token_ids")),
        _object(ours["state"], "state"),
        ours.get("first_page", 0),
    )


def _keys(found: Mapping[str, Any], required: set[str], optional: set[str], what: str) -> None:
    missing, unknown = required - found.keys(), found.keys() - required - optional
    if missing or unknown:
        raise InvalidManifest(
            f"manifest: {what} lacks {sorted(missing)} and has unknown {sorted(unknown)!r:.200}"
            if missing
            else f"manifest: {what} has unknown keys {sorted(unknown)!r:.200}"
        )


def _object(value: Any, what: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise InvalidManifest(f"manifest: {what} must be an object, got {value!r:.80}")


def _list(value: Any, what: str) -> list[Any]:
    if isinstance(value, list):
        return value
    raise InvalidManifest(f"manifest: {what} must be an array, got {value!r:.80}")
