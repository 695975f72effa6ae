"""Cartridges in a repository: a cartridge as a snapshot, and a snapshot of an engine as a cartridge.

Knows pages, and the orders in which engines keep what is in them. Must not know engines.

As a snapshot a cartridge has pages like those of an engine: content-addressed, so that versions of it, and sessions
that begin with it, share them; named, tagged and kept by the repository's rules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from kvist.cartridge.cartridge import Cartridge
from kvist.cartridge.manifest import CartridgeManifest
from kvist.cartridge.model import LAYOUT_DTYPES, ModelIdentity, revision_like
from kvist.cartridge.placing import VIRTUAL
from kvist.cartridge.reading import verify_content
from kvist.cartridge.shards import named_tensors, tensor_bytes
from kvist.errors import InvalidInput, LayoutMismatch, NotFound, UnsupportedModel
from kvist.ids import check_name, short
from kvist.layout import Layout
from kvist.pager.orders import AXES, axes_of, shape_of
from kvist.pager.sharding import rank_heads
from kvist.repo import LogicalSeq, Manifest, PageEntry, RefKind, Repository, Snapshot

SEQUENCE: Final = "cartridge"
"""The sequence of a cartridge's snapshot."""

STATE: Final = "kvist_cartridge"
"""The key of that sequence's state under which its manifest is."""

BRANCHES: Final = "cartridge/"
"""Branches of cartridges begin so."""

_DTYPES: Final = {ours: name for name, ours in LAYOUT_DTYPES.items()}
_WINDOW: Final = 256 << 20


def to_repository(cartridge: Cartridge, repo: Repository, *, name: str, page_size_tokens: int = 16) -> Snapshot:
    """Store a cartridge as a snapshot at the tip of the branch ``cartridge/<name>``.

    Args:
        cartridge: all of whose layers have one shape.
        repo: where to.
        name: of the branch, below ``cartridge/``.
        page_size_tokens: tokens a page; that of an engine, to share pages with its snapshots.

    Returns:
        The new tip; the old one, if that is this cartridge already.

    Raises:
        LayoutMismatch: layers of several shapes.
        InvalidName, Conflict, StoreError: as `Repository.commit`.
    """
    branch = check_name(BRANCHES + name)
    manifest = cartridge.manifest
    if len(set(manifest.layers)) > 1:
        raise LayoutMismatch(f"{cartridge!r} has layers of several shapes, the pages of a layout have one")
    layout = Layout(
        page_size_tokens=page_size_tokens,
        n_layers=manifest.num_layers,
        n_heads=manifest.num_kv_heads,
        head_dim=manifest.head_dim,
        dtype=LAYOUT_DTYPES[manifest.dtype],
        model=manifest.model_id,
        revision=manifest.model_revision,
    )
    digests: list[str] = []
    for pages in _encoded(cartridge, layout):
        data, size = tensor_bytes(pages), layout.page_bytes
        digests += repo.put_pages([data[start : start + size] for start in range(0, len(data), size)]).digests
    count = len(digests) // 2
    sequence = LogicalSeq(
        SEQUENCE,
        tuple(range(count)),
        cartridge.num_tokens % page_size_tokens,
        cartridge.token_ids or (),
        {STATE: dataclasses.replace(manifest, files=(), file_size_bytes=0).to_dict()},
    )
    entries = tuple(PageEntry(ix, digests[2 * ix], digests[2 * ix + 1]) for ix in range(count))
    made = Manifest(layout, entries, (sequence,))
    tip = repo.refs.read(RefKind.BRANCH, branch)
    if tip is not None and tip.cid is not None and (there := repo.snapshot(tip.cid)).manifests == (made.cid,):
        return there
    return repo.commit([made], branch=branch, name=manifest.cartridge_id, message=f"cartridge {manifest.cartridge_id}")


def from_repository(
    repo: Repository,
    rev: str,
    *,
    sequence: str | None = None,
    tokens: int | None = None,
    model: ModelIdentity | None = None,
    directory: str | Path | None = None,
    cartridge_id: str | None = None,
    labels: Mapping[str, str] | None = None,
) -> Cartridge:
    """A cartridge of a snapshot: one that `to_repository` stored, or a sequence that an engine computed.

    All tensor-parallel ranks of it are put together. What an engine computed is the lossless prefill of the sequence's
    token ids, where the snapshot has them all.

    Args:
        repo: where from.
        rev: of the snapshot; see `Repository.resolve`.
        sequence: its id; may be ``None`` where the snapshot has one.
        tokens: only so many of its first tokens; ``None``: all that are cached.
        model: whose cache it is, as far as the snapshot does not say: rotary embedding, tokenizer, and KV heads where
            ranks hold copies of one another's. Compared with what it does say.
        directory: where to save it; ``None``: it stays in memory.
        cartridge_id: default that of the stored cartridge, else the sequence's id.
        labels: of the cartridge.

    Raises:
        NotFound: no such snapshot or sequence, or a rank of it is missing.
        InvalidInput: several sequences and none named; or more tokens wanted than are cached.
        UnsupportedModel: latent (MLA) or sliding attention, layers in several groups, or an order of pages that only
            their engine can read.
        LayoutMismatch: ``model`` is another, or the ranks hold different sequences.
        MissingPage, DamagedPage: the repository does not have it whole.
    """
    snapshot = repo.snapshot(rev)
    ranks = repo.manifests(snapshot.cid)
    _check_layouts(ranks, rev)
    chosen = [_sequence(rank, sequence, rev) for rank in ranks]
    layout = ranks[0].layout
    cached = _cached(chosen, layout, rev)
    count = cached if tokens is None else tokens
    if not 0 < count <= cached:
        raise InvalidInput(f"{rev}: sequence {chosen[0].id!r} has {cached} cached tokens, wanted {count}")
    found = _model_of(ranks, model)
    said = chosen[0].state.get(STATE)
    stored = said if isinstance(said, Mapping) else None
    # A stored cartridge is read whole, whatever is wanted of it: its checksum is of the whole.
    keys, values = _decoded(repo, ranks, chosen, count if stored is None else cached, found.num_kv_heads)
    layers = list(zip(keys, values, strict=True))
    if stored is not None:
        cartridge = _cut(_stored(layers, stored, chosen[0]), count)
        changes: dict[str, Any] = {"cartridge_id": cartridge_id, "labels": labels}
        if any(value is not None for value in changes.values()):
            cartridge = cartridge.with_metadata(**changes)
    else:
        ids = chosen[0].token_ids[:count]
        made: dict[str, Any] = {"snapshot": snapshot.cid, "sequence": chosen[0].id, "numerics": dict(ranks[0].numerics)}
        cartridge = Cartridge.create(
            layers,
            found,
            cartridge_id=cartridge_id or chosen[0].id,
            token_ids=ids if ids and VIRTUAL not in ids else None,
            source_format="snapshot",
            source_document=f"snapshot {short(snapshot.cid)}",
            block_size=layout.page_size_tokens,
            labels=labels,
            provenance={"made_by": "kvist", "from": made},
        )
    if model is not None:
        cartridge.manifest.require(model)
    if directory is not None:
        cartridge.save_pretrained(directory)
    return cartridge


def model_of(repo: Repository, rev: str, directory: str | Path) -> ModelIdentity:
    """The identity of the model in a directory, in the terms of a snapshot of its cache: for `from_repository`."""
    ranks = repo.manifests(rev)
    _check_layouts(ranks, rev)
    layout = ranks[0].layout
    pinned = revision_like(directory, layout.revision)
    return ModelIdentity.of_directory(directory, dtype=_DTYPES[layout.dtype], model_id=layout.model, revision=pinned)


# -- into pages --------------------------------------------------------------------------------------------------


def _encoded(cartridge: Cartridge, layout: Layout) -> Iterator[Tensor]:
    """Pages ``[pages, 2, layers, tokens, heads, head_dim]``, some at a time; the last one padded with zeros."""
    size, dtype = layout.page_size_tokens, getattr(torch, cartridge.manifest.dtype)
    step = max(1, _WINDOW // (2 * layout.page_bytes)) * size
    for start in range(0, cartridge.num_tokens, step):
        end = min(start + step, cartridge.num_tokens)
        shape = (-(-(end - start) // size), 2, layout.n_layers, size, layout.n_heads, layout.head_dim)
        pages = torch.zeros(shape, dtype=dtype)
        for number in range(layout.n_layers):
            for half, tensor in enumerate(cartridge.layer(number)):
                rows = torch.zeros((shape[0] * size, *shape[4:]), dtype=dtype)
                rows[: end - start] = tensor[start:end]
                pages[:, half, number] = rows.view(shape[0], *shape[3:])
        yield pages


# -- out of pages ------------------------------------------------------------------------------------------------


def _check_layouts(ranks: Sequence[Manifest], rev: str) -> None:
    layouts = [rank.layout for rank in ranks]
    for layout in layouts:
        if layout.attention != "full":
            raise UnsupportedModel(f"{rev} holds {layout.attention} attention, a cartridge only full attention")
        if layout.n_groups != 1:
            raise UnsupportedModel(f"{rev} holds layers in {layout.n_groups} groups, a cartridge all layers in one")
        axes_of(layout, rev)
        if layout.dtype not in _DTYPES:
            raise UnsupportedModel(f"{rev} holds {layout.dtype} pages, a cartridge one of {', '.join(_DTYPES)}")
    if not layouts:
        raise NotFound(f"{rev} holds no manifest")
    if missing := sorted(set(range(layouts[0].tp_size)) - {layout.tp_rank for layout in layouts}):
        raise NotFound(f"{rev} lacks ranks {missing} of {layouts[0].tp_size}")
    same = {dataclasses.replace(layout, tp_rank=0) for layout in layouts}
    if len(same) > 1:
        raise LayoutMismatch(f"the ranks of {rev} differ in their layouts")


def _sequence(rank: Manifest, name: str | None, rev: str) -> LogicalSeq:
    if name is None:
        if len(rank.sequences) != 1:
            names = [seq.id for seq in rank.sequences]
            raise InvalidInput(f"{rev} has {len(names)} sequences; name one of them: {names!r:.200}")
        return rank.sequences[0]
    found = rank.sequence(name)
    if found is None:
        raise NotFound(f"{rev} has no sequence {name!r}; it has {[seq.id for seq in rank.sequences]!r:.200}")
    return found


def _cached(chosen: Sequence[LogicalSeq], layout: Layout, rev: str) -> int:
    """How many of its tokens are cached, by all ranks, which must be of one sequence for that."""
    cached = [seq.cached_tokens(layout.page_size_tokens) for seq in chosen]
    said = [(seq.token_ids, seq.state.get(STATE)) for seq in chosen]
    if len(set(cached)) > 1 or any(one != said[0] for one in said):
        raise LayoutMismatch(
            f"{rev}: its ranks hold different sequences {chosen[0].id!r}: expected one number of cached tokens, the "
            f"same token ids and the same manifest, got {cached!r:.80} tokens"
        )
    return cached[0]


def _model_of(ranks: Sequence[Manifest], model: ModelIdentity | None) -> ModelIdentity:
    """What the snapshot says of its model, completed by what the caller does."""
    layout = ranks[0].layout
    heads = layout.n_heads * layout.tp_size
    if model is not None and model.num_kv_heads < heads and layout.n_heads == 1:
        heads = model.num_kv_heads  # ranks hold copies of one another's heads
    name = layout.model or (model.model_id if model is not None else None)
    if name is None:
        raise InvalidInput("the snapshot does not say whose cache it is; give the model")
    return ModelIdentity(
        model_id=name,
        revision=layout.revision or (model.revision if model is not None else None),
        num_layers=layout.n_layers,
        num_kv_heads=heads,
        head_dim=layout.head_dim,
        dtype=_DTYPES[layout.dtype],
        rope=model.rope if model is not None else {},
        tokenizer_hash=model.tokenizer_hash if model is not None else None,
    )


def _decoded(
    repo: Repository, ranks: Sequence[Manifest], chosen: Sequence[LogicalSeq], tokens: int, heads: int
) -> tuple[Tensor, Tensor]:
    """Keys and values, ``[layers, tokens, heads, head_dim]``, of all ranks together."""
    layout = ranks[0].layout
    dtype: torch.dtype = getattr(torch, _DTYPES[layout.dtype])
    whole = torch.empty((2, layout.n_layers, tokens, heads, layout.head_dim), dtype=dtype)
    for rank, seq in zip(ranks, chosen, strict=True):
        mine = rank_heads(heads, layout.tp_size, rank.layout.tp_rank)
        place = whole[:, :, :, mine.start : mine.stop]
        for start, pages in _pages(repo, rank, seq, tokens):
            end = min(tokens, start + pages.shape[0] * layout.page_size_tokens)
            for half, axes in enumerate(AXES[layout.memory_order]):
                rows = _in_order(pages[:, half], axes, layout, dtype)
                place[half, :, start:end] = rows[:, : end - start]
    return whole[0], whole[1]


def _pages(repo: Repository, rank: Manifest, seq: LogicalSeq, tokens: int) -> Iterator[tuple[int, Tensor]]:
    """The position of a first token, and bytes ``[pages, 2, page_bytes]``, some pages at a time."""
    layout, entries = rank.layout, {page.ix: page for page in rank.pages}
    needed = seq.page_ixs[: -(-tokens // layout.page_size_tokens)]
    step = max(1, _WINDOW // (2 * layout.page_bytes))
    for first in range(0, len(needed), step):
        some = [entries[ix] for ix in needed[first : first + step]]
        pages = torch.empty((len(some), 2, layout.page_bytes), dtype=torch.uint8)
        data = tensor_bytes(pages)
        digests = [digest for entry in some for digest in (entry.k, entry.v)]
        size = layout.page_bytes
        repo.get_pages(digests, [data[i * size : (i + 1) * size] for i in range(len(digests))])
        yield first * layout.page_size_tokens, pages


def _in_order(halves: Tensor, axes: str, layout: Layout, dtype: torch.dtype) -> Tensor:
    """One half of some pages, ``[pages, page_bytes]``, as ``[layers, tokens, heads, head_dim]``."""
    half = halves.contiguous().view(dtype).view(halves.shape[0], *shape_of(layout, axes))
    layers = half.permute(1 + axes.index("L"), 0, *(1 + axes.index(axis) for axis in "NHD"))
    return layers.reshape(layout.n_layers, -1, layout.n_heads, layout.head_dim)


def _stored(layers: Sequence[tuple[Tensor, Tensor]], document: Mapping[str, Any], seq: LogicalSeq) -> Cartridge:
    """The cartridge whose manifest the snapshot holds, checked against its pages."""
    manifest = CartridgeManifest.from_dict(document)
    tensors = named_tensors(layers, seq.token_ids if manifest.has_token_ids else None)
    verify_content(manifest, tensors)
    return Cartridge(manifest, tensors, None)


def _cut(cartridge: Cartridge, tokens: int) -> Cartridge:
    """Its first tokens, with all that is said of it; itself, where that is all of them."""
    if tokens == cartridge.num_tokens:
        return cartridge
    manifest, ids = cartridge.manifest, cartridge.token_ids
    layers = [cartridge.layer(number) for number in range(cartridge.num_layers)]
    return Cartridge.create(
        [(keys[:tokens], values[:tokens]) for keys, values in layers],
        manifest.model,
        cartridge_id=manifest.cartridge_id,
        token_ids=None if ids is None else ids[:tokens],
        num_frozen_tokens=min(manifest.num_frozen_tokens, tokens),
        first_position=manifest.first_position,
        training_steps=manifest.training_steps,
        source_document=manifest.source_document,
        source_format=manifest.source_format,
        resource_kind=manifest.resource_kind,
        block_size=manifest.block_size,
        labels=manifest.labels,
        provenance={**manifest.provenance, "cut": {"tokens": tokens, "of": manifest.identity}},
        license=manifest.license,
        chat_template_hash=manifest.chat_template_hash,
    )
