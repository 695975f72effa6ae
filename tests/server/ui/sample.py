"""A repository such as people have: conversations that grow, branch, are merged and tagged. The same every time."""

from __future__ import annotations

import random
from collections.abc import Iterator

from kvist.layout import Layout
from kvist.repo import LogicalSeq, Manifest, PageEntry, Repository, Snapshot

LAYOUT = Layout(
    page_size_tokens=16, n_layers=4, n_heads=2, head_dim=32, dtype="bf16", model="Qwen/Qwen3-0.6B", revision="main"
)
_WORK = (
    "system prompt and tools", "read the repository", "plan the change", "first draft", "tests fail on arm64",
    "fix the flaky test", "try a smaller window", "review comments", "benchmarks", "compare with main",
    "rewrite the parser", "profile the hot path", "docs", "before the refactor", "after the refactor",
    "ask for a second opinion", "long context: 128k", "summarise so far", "retry with temperature 0", "ship it",
)  # fmt: skip
_BRANCHES = ("main", "experiment/sampling", "experiment/long-context", "agents/reviewer", "agents/tester", "wip/parser")


class Maker:
    """Makes snapshots of made-up conversations; pages of a prefix are shared, as an engine's are."""

    def __init__(self, repo: Repository, seed: int = 7) -> None:
        self.repo = repo
        self.random = random.Random(seed)
        self._pages: dict[str, list[tuple[str, str]]] = {}

    def snapshot(self, branch: str, message: str, *, new: int, parents: tuple[Snapshot, ...] = ()) -> Snapshot:
        """One that goes on from its first parent with ``new`` more pages."""
        pages = list(self._pages[parents[0].cid]) if parents else []
        halves = [self.random.randbytes(LAYOUT.page_bytes) for _ in range(2 * new)]
        digests = self.repo.put_pages(halves).digests
        pages += list(zip(digests[::2], digests[1::2], strict=True))
        ids = tuple(self.random.randrange(32000) for _ in range(16 * len(pages) + 3))
        entries = tuple(PageEntry(ix, k, v) for ix, (k, v) in enumerate(pages))
        sequence = LogicalSeq(f"chatcmpl-{branch.replace('/', '-')}", tuple(range(len(pages))), 0, ids)
        made = self.repo.commit(
            [Manifest(LAYOUT, entries, (sequence,))],
            parents=[parent.cid for parent in parents],
            message=message,
            branch=branch,
        )
        self._pages[made.cid] = pages
        return made

    def fork(self, rev: Snapshot, n: int, name: str) -> list[Snapshot]:
        """Forks, which hold what ``rev`` holds."""
        forks = self.repo.fork(rev.cid, n, name=name)
        for fork in forks:
            self._pages[fork.cid] = self._pages[rev.cid]
        return forks


def fill(repo: Repository, count: int = 200) -> list[Snapshot]:
    """Make ``count`` snapshots with forks, merges and tags; the oldest first."""
    return list(_fill(Maker(repo), count))


def _fill(maker: Maker, count: int) -> Iterator[Snapshot]:
    rng = maker.random
    first = maker.snapshot("main", _WORK[0], new=8)
    yield first
    tips: dict[str, Snapshot] = {"main": first}
    made, tags = 1, 0
    while made < count:
        step = rng.random()
        if step < 0.05 and made + 3 <= count:
            source = tips[rng.choice(list(tips))]
            for number, fork in enumerate(maker.fork(source, 3, f"fork/{made}")):
                yield fork
                tips[f"fork/{made}/{number}"] = fork
            made += 3
            continue
        branch = rng.choice([*["main"] * 6, *_BRANCHES, *list(tips)[-3:]])
        tip = tips.get(branch)
        if tip is None:
            source = tips[rng.choice(list(tips))]
            tips[branch] = maker.snapshot(branch, f"{rng.choice(_WORK)} ({branch})", new=2, parents=(source,))
        elif step > 0.9 and len(tips) > 2:
            other = rng.choice([name for name in tips if name != branch])
            both = dict.fromkeys((tip, tips[other]))
            tips[branch] = maker.snapshot(branch, f"merge {other} into {branch}", new=2, parents=tuple(both))
        else:
            tips[branch] = maker.snapshot(branch, rng.choice(_WORK), new=rng.randrange(1, 6), parents=(tip,))
        made += 1
        yield tips[branch]
        if made % 33 == 0:
            tags += 1
            maker.repo.tag(f"v0.{tags}", tips["main"].cid)
