"""`kvist log`, `show` and `diff`: commands that look at snapshots. They change nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import click

from kvist.cli.graph import draw
from kvist.cli.invocation import Invocation, common
from kvist.cli.output import Line, Styled, Table
from kvist.cli.text import age
from kvist.errors import PrunedSnapshot
from kvist.ids import short
from kvist.repo import Manifest, Ref, RefKind, Repository, Snapshot, compare, lineage

# -- log ---------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("rev", required=False)
@click.option("--graph", is_flag=True, help="Draw who continues whom.")
@click.option("-n", "--max", "most", type=click.IntRange(min=0), metavar="MAX", help="List at most so many.")
@common
def log(run: Invocation, rev: str | None, graph: bool, most: int | None) -> None:
    """List snapshots, newest first.

    Those that REV descends from, itself included; without REV, all that a branch or tag reaches. Of one that was
    pruned only the record is left.
    """
    with run.open() as repo:
        snapshots = repo.log(rev)[:most]
        refs = _refs(repo)
        pruned = repo.pruned()
    parents = {snapshot.cid: snapshot.parents for snapshot in snapshots}.__getitem__
    rows = list(lineage.lanes((snapshot.cid for snapshot in snapshots), parents)) if graph else []
    listed = [
        _to_json(snapshot, refs.get(snapshot.cid, [])) | {"pruned": snapshot.cid in pruned} for snapshot in snapshots
    ]
    for row, one in zip(rows, listed, strict=False):
        one["graph"] = {"lane": row.lane, "before": row.before, "after": row.after}

    def text() -> Iterator[Line]:
        labels = dict(zip((snapshot.cid for snapshot in snapshots), _labels(snapshots, refs, pruned), strict=True))
        if not graph:
            yield from labels.values()
        for art, cid in draw(rows, parents):
            yield art if cid is None else (f"{art} ", *labels[cid])

    if not snapshots and most != 0:
        run.out.note("no snapshots yet")
    run.out.result({"snapshots": listed}, ids=(snapshot.cid for snapshot in snapshots), text=text())


def _labels(
    snapshots: Sequence[Snapshot], refs: dict[str, list[Ref]], pruned: set[str]
) -> Iterator[tuple[str | Styled, ...]]:
    """One line a snapshot: cid, age, tokens, refs, name and the first line of the message."""
    now = time.time_ns()
    tokens = max((len(f"{snapshot.tokens:,}") for snapshot in snapshots), default=0)
    for snapshot in snapshots:
        named = refs.get(snapshot.cid, [])
        said = [snapshot.name] if snapshot.name and snapshot.name not in {ref.name for ref in named} else []
        said += snapshot.message.splitlines()[:1]
        facts = f"  {age(snapshot.created_ns, now):>3}  {snapshot.tokens:>{tokens},} tok"
        more = f"  {': '.join(said)}" if said else ""
        if snapshot.cid in pruned:
            yield (Styled(f"{short(snapshot.cid)}{facts}  (pruned){more}", "bright_black"),)
        else:
            yield (Styled(short(snapshot.cid), "yellow"), facts, *_chips(named), more)


def _chips(refs: Sequence[Ref]) -> Iterator[str | Styled]:
    for number, ref in enumerate(refs):
        yield " " if number else "  "
        yield Styled(f"[{ref.name}]", "green") if ref.kind is RefKind.BRANCH else Styled(f"[tag: {ref.name}]", "cyan")


# -- show --------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("rev")
@common
def show(run: Invocation, rev: str) -> None:
    """Describe one snapshot.

    Its names and parents; and of each manifest (one a tensor-parallel rank and group of layers) the layout, and the
    sequences with their tokens, pages and how full the last page is.
    """
    with run.open() as repo:
        snapshot = repo.snapshot(rev)
        try:
            manifests = repo.manifests(snapshot.cid)
        except PrunedSnapshot as error:
            manifests = []
            run.out.note(str(error))
        refs = _refs(repo).get(snapshot.cid, [])
    document = _to_json(snapshot, refs) | {
        "nonce": snapshot.nonce,
        "page_bytes": sum({name: m.layout.page_bytes for m in manifests for name in m.digests}.values()),
        "manifests": [_manifest_to_json(manifest) for manifest in manifests],
    }
    run.out.result(document, ids=[snapshot.cid], text=_describe(document))


def _describe(document: dict[str, Any]) -> Iterator[Line | Table]:
    facts = [("snapshot", document["cid"])]
    facts += [(ref["kind"], ref["name"]) for ref in document["refs"]]
    facts += [("parent", parent) for parent in document["parents"]]
    facts += [("created", f"{document['created']} ({age(document['created_ns'], time.time_ns())} ago)")]
    facts += [("name", document["name"])] if document["name"] else []
    facts += [("tokens", f"{document['tokens']:,}"), ("bytes of pages", f"{document['page_bytes']:,}")]
    yield Table(("", ""), facts)
    if document["message"]:
        yield ""
        yield from (f"    {line}" for line in document["message"].splitlines())
    for manifest in document["manifests"]:
        layout = manifest["layout"]
        yield ""
        yield Table(
            ("", ""),
            [
                ("manifest", manifest["cid"]),
                ("model", f"{layout['model'] or 'not named'}, revision {layout['revision'] or 'not named'}"),
                (
                    "layout",
                    f"{layout['n_layers']} layers x {layout['n_heads']} KV heads x {layout['head_dim']}, "
                    f"{layout['dtype']}, {layout['page_size_tokens']} tokens a page, {layout['memory_order']}, "
                    f"rank {layout['tp_rank']} of {layout['tp_size']}{_uncommon(layout)}",
                ),
                ("fingerprint", layout["fingerprint"]),
                ("pages", f"{manifest['pages']:,} of 2 x {layout['page_bytes']:,} bytes"),
            ],
        )
        if manifest["sequences"]:
            yield ""
            yield _sequence_table(manifest["sequences"], layout)


def _uncommon(layout: dict[str, Any]) -> str:
    group = f", group {layout['group']} of {layout['n_groups']}" if layout["n_groups"] > 1 else ""
    return group + (f", {layout['attention']} attention" if layout["attention"] != "full" else "")


def _sequence_table(sequences: Sequence[dict[str, Any]], layout: dict[str, Any]) -> Table:
    """The first page is told only where some sequence has lost pages before it."""
    rows = [(seq["id"], seq["tokens"], seq["pages"], _fill(seq["pages"], seq["fill"], layout)) for seq in sequences]
    if not any(seq["first_page"] for seq in sequences):
        return Table(("sequence", "tokens", "pages", "last page"), rows)
    wider = [(*row[:2], seq["first_page"], *row[2:]) for row, seq in zip(rows, sequences, strict=True)]
    return Table(("sequence", "tokens", "first page", "pages", "last page"), wider)


def _fill(pages: int, fill: int, layout: dict[str, Any]) -> str:
    if not pages:
        return "none"
    return f"{fill} of {layout['page_size_tokens']}" if fill else "full"


# -- diff --------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("a")
@click.argument("b")
@common
def diff(run: Invocation, a: str, b: str) -> None:
    """Tell what two snapshots share.

    Page halves are counted once a snapshot; tokens are those of the longest common prefix of each sequence.
    """
    with run.open() as repo:
        found = compare.diff(repo, a, b)

    def text() -> Iterator[Line | Table]:
        same = "same layout" if found.same_layout else "different layouts: no page of one fits the other's engine"
        yield Table(("", ""), [("a", found.a), ("b", found.b), ("layout", same)])
        yield ""
        pages = ("page halves", found.pages_shared, found.pages_only_a, found.pages_only_b)
        size = ("bytes", found.bytes_shared, found.bytes_only_a, found.bytes_only_b)
        parts = [
            (f"rank {part.tp_rank}, group {part.group}", part.pages_shared, part.pages_only_a, part.pages_only_b)
            for part in found.parts
        ]
        yield Table(("", "shared", "only in a", "only in b"), [pages, size, *(parts if len(parts) > 1 else [])])
        if found.sequences:
            yield ""
            rows = [(seq.id, seq.tokens_shared, seq.tokens_a, seq.tokens_b) for seq in found.sequences]
            yield Table(("sequence", "shared tokens", "in a", "in b"), rows)

    run.out.result(found.to_json(), ids=[found.a, found.b], text=text())


# -- snapshots as JSON -------------------------------------------------------------------------------------------


def _refs(repo: Repository) -> dict[str, list[Ref]]:
    """Refs by the cid they name."""
    found: dict[str, list[Ref]] = {}
    for ref in repo.refs.all():
        if ref.cid is not None:
            found.setdefault(ref.cid, []).append(ref)
    return found


def _to_json(snapshot: Snapshot, refs: Sequence[Ref]) -> dict[str, Any]:
    return {
        "cid": snapshot.cid,
        "parents": snapshot.parents,
        "refs": [{"kind": ref.kind.noun, "name": ref.name} for ref in refs],
        "tokens": snapshot.tokens,
        "name": snapshot.name,
        "message": snapshot.message,
        "created_ns": snapshot.created_ns,
        "created": datetime.fromtimestamp(snapshot.created_ns // 10**9, UTC).isoformat(),
    }


def _manifest_to_json(manifest: Manifest) -> dict[str, Any]:
    layout = manifest.layout
    return {
        "cid": manifest.cid,
        "layout": asdict(layout) | {"fingerprint": layout.fingerprint, "page_bytes": layout.page_bytes},
        "numerics": manifest.numerics,
        "pages": len(manifest.pages),
        "page_bytes": _page_bytes(manifest),
        "tokens": manifest.tokens,
        "sequences": [
            {
                "id": seq.id,
                "tokens": seq.cached_tokens(layout.page_size_tokens),
                "token_ids": len(seq.token_ids),
                "first_page": seq.first_page,
                "pages": len(seq.page_ixs),
                "fill": seq.fill_in_last_page,
            }
            for seq in manifest.sequences
        ],
    }


def _page_bytes(manifest: Manifest) -> int:
    return len(set(manifest.digests)) * manifest.layout.page_bytes
