"""Repositories made by hand, and a way to run `kvist` on them within this process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kvist.cli.main import main
from kvist.hashing import Buffer
from kvist.layout import Layout
from kvist.repo import LogicalSeq, Manifest, PageEntry, RefKind, Repository, Snapshot

LAYOUT = Layout(page_size_tokens=4, n_layers=2, n_heads=1, head_dim=8, dtype="bf16", model="org/tiny", revision="r1")
NOW_NS = 1_700_000_000 * 10**9
MINUTE_NS = 60 * 10**9


def half(number: int) -> bytes:
    return number.to_bytes(4, "little") * (LAYOUT.page_bytes // 4)


def put_manifest(repo: Repository, first: int, pages: int, *, sequence: str = "s", fill: int = 0) -> Manifest:
    """Store ``pages`` pages, numbered from ``first``, and a sequence that runs through them."""
    halves: list[Buffer] = [half(2 * (first + i) + j) for i in range(pages) for j in range(2)]
    digests = repo.put_pages(halves).digests
    entries = tuple(PageEntry(ix, digests[2 * ix], digests[2 * ix + 1]) for ix in range(pages))
    tokens = range(100 + first, 100 + first + pages * 4 - (4 - fill if fill else 0))
    manifest = Manifest(LAYOUT, entries, (LogicalSeq(sequence, tuple(range(pages)), fill, tuple(tokens)),))
    repo.objects.put_manifests([manifest])
    return manifest


@dataclass
class Graph:
    """Snapshots with letters for names, of one manifest, a minute apart by a clock that stands still."""

    repo: Repository
    manifest: Manifest
    cids: dict[str, str]

    def add(self, letter: str, parents: str = "", *, branch: str | None = None, message: str = "") -> str:
        snapshot = Snapshot(
            (self.manifest.cid,),
            tuple(self.cids[parent] for parent in parents.split()),
            self.manifest.tokens,
            name=letter,
            message=message,
            created_ns=NOW_NS + len(self.cids) * MINUTE_NS,
        )
        self.repo.objects.put_snapshots([snapshot])
        self.cids[letter] = snapshot.cid
        if branch is not None:
            found = self.repo.refs.read(RefKind.BRANCH, branch)
            if found is None:
                self.repo.refs.create(RefKind.BRANCH, branch, snapshot.cid)
            else:
                self.repo.refs.move(found, snapshot.cid)
        return snapshot.cid


@dataclass
class Ran:
    """What a run of `kvist` did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.err)["error"]


class Kvist:
    """Runs `kvist` on one store."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def url(self) -> str:
        return self.root.as_uri() + "?durable=0"

    def __call__(self, *words: str, env: dict[str, str | None] | None = None, stdin: str | None = None) -> Ran:
        """Run, and say the store in the environment."""
        return run(words, {"KVIST_STORE": self.url} | (env or {}), stdin)

    def ok(self, *words: str) -> Ran:
        ran = self(*words)
        assert ran.code == 0, ran.err
        return ran

    def opened(self) -> Repository:
        return Repository.open(self.url)


def run(words: Sequence[str], env: dict[str, str | None], stdin: str | None = None) -> Ran:
    result = CliRunner(catch_exceptions=False).invoke(main, list(words), env=env, input=stdin)
    return Ran(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def kvist(tmp_path: Path) -> Kvist:
    """`kvist` on an empty repository."""
    made = Kvist(tmp_path / "store")
    Repository.init(made.url).close()
    return made


@pytest.fixture
def graph(kvist: Kvist, monkeypatch: pytest.MonkeyPatch) -> Iterator[Graph]:
    """An empty graph in the repository of ``kvist``; a day has passed since its first snapshot."""
    with kvist.opened() as repo:
        yield Graph(repo, put_manifest(repo, 0, 2, fill=3), {})
