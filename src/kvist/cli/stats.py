"""`kvist stats`: what a repository holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import click

from kvist.cli.invocation import Invocation, common
from kvist.cli.output import Line, Table
from kvist.cli.upkeep import identity
from kvist.ids import short
from kvist.repo import stats as counting


@click.command()
@common
def stats(run: Invocation) -> None:
    """Count what the repository holds.

    In all, by branch and by layout: bytes as if each snapshot had its own pages (logical), of distinct pages, of the
    pages that only one branch reaches (own: what deleting it would free), and what a gc would free now.
    """
    with run.open() as repo:
        known = identity(repo)
        found = counting.count(repo)

    def text() -> Iterator[Line | Table]:
        names = [field.name for field in fields(found) if not field.name.startswith("by_")]
        numbers = [(name.replace("_", " "), _number(getattr(found, name))) for name in names]
        width = max(len(number) for _, number in numbers)
        rows = [(name.replace("_", " "), value) for name, value in known.items()]
        rows += [(name, number.rjust(width)) for name, number in [*numbers, ("dedup", f"{found.dedup:.2f}x")]]
        yield Table(("", ""), rows)
        if found.by_branch:
            yield ""
            titles = ("branch", "tip", "snapshots", "pruned", "logical bytes", "page bytes", "own bytes")
            yield Table(
                titles,
                [
                    (
                        one.name,
                        short(one.cid),
                        one.snapshots,
                        one.pruned,
                        one.logical_bytes,
                        one.page_bytes,
                        one.own_bytes,
                    )
                    for one in found.by_branch
                ],
            )
        if found.by_layout:
            yield ""
            titles = ("layout", "model", "dtype", "part", "snapshots", "logical bytes", "page bytes")
            yield Table(
                titles,
                [
                    (
                        one.fingerprint.rpartition(":")[2][:12],
                        one.model or "not named",
                        one.dtype,
                        f"rank {one.tp_rank}, group {one.group}",
                        one.snapshots,
                        one.logical_bytes,
                        one.page_bytes,
                    )
                    for one in found.by_layout
                ],
            )

    run.out.result(known | found.to_json(), ids=[known["id"]], text=text())


def _number(value: int | None) -> str:
    return "unknown: gc refuses" if value is None else f"{value:,}"
