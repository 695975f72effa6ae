"""From a capture to a snapshot: its parents, its branch, and the commit. Knows a repository; must not know engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from kvist.errors import Conflict, EngineError
from kvist.repo import Manifest, Repository, Snapshot
from kvist.server.heads import Heads
from kvist.server.history import parts_of_rank
from kvist.server.live.client import Captured
from kvist.server.schema import SnapshotBody

_COMMITS: Final = 5
"""Times to commit, where others move the branch meanwhile."""


@dataclass(frozen=True, slots=True)
class Committed:
    """What a commit made.

    Attributes:
        snapshot: the new one.
        branch: that it moved.
        groups: the first rank's manifests, by group.
    """

    snapshot: Snapshot
    branch: str
    groups: list[Manifest]


@dataclass(frozen=True, slots=True)
class Commit:
    """From a capture to a snapshot.

    Attributes:
        repo: where it goes.
        heads: what sequences continue.
        body: of the call.
        captured: what is stored by now.
        wanted: the branch that the call names, or ``None``: ``main`` for a whole engine, else the request's own.
        engine_heads: what the whole engine continues: all that is checked out.
        request_of: see `kvist.server.live.client.Engine`.
    """

    repo: Repository
    heads: Heads
    body: SnapshotBody
    captured: Captured
    wanted: str | None
    engine_heads: list[str]
    request_of: Callable[[str], str]

    def run(self) -> Committed:
        """Commit, where the branch is by now.

        Raises:
            EngineError: nothing was captured.
            Conflict: the parents that the call names are not the branch's, or others keep moving it.
            StoreFull, …: see `Repository.commit`.
        """
        body, repo = self.body, self.repo
        manifests = [repo.manifest(cid) for rank in self.captured.manifests for cid in rank]
        if not manifests:
            raise EngineError("the engine captured nothing, not even an empty manifest")
        groups = parts_of_rank(manifests, 0)
        names = [seq.id for seq in groups[0].sequences]
        is_whole = body.request_id is None and body.sequence is None
        branch = self.wanted if self.wanted is not None else "main" if is_whole else f"seq/{self._common(names)}"
        heads = self.engine_heads if is_whole else [self._head(name) for name in names]
        for attempt in range(_COMMITS):
            parents = self.heads.parents(heads, branch, body.parents)
            try:
                snapshot = repo.commit(manifests, parents=parents, name=body.name, message=body.message, branch=branch)
            except Conflict:  # another process moved the branch in between: continue what it names now
                if body.parents is not None or attempt == _COMMITS - 1:
                    raise
            else:
                return Committed(snapshot, branch, groups)
        raise AssertionError("unreachable")

    def _head(self, sequence_id: str) -> str | None:
        """HEAD of a sequence, or of the request of which it is one choice."""
        found = self.heads.of(sequence_id)
        while found is None and (less := self.request_of(sequence_id)) != sequence_id:
            found, sequence_id = self.heads.of(less), less
        return found

    def _common(self, names: list[str]) -> str:
        """The name of a request, of which these are the choices."""
        return names[0] if len(names) == 1 else self.request_of(names[0]) if names else "none"
