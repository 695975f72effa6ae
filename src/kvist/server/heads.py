"""HEAD: which snapshot a sequence continues, and so which parents its next snapshot has.

Knows a repository and the names of sequences. Must not know engines or HTTP.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final

from kvist.errors import Conflict, NotFound
from kvist.repo import RefKind, Repository
from kvist.repo.lineage import ancestors
from kvist.repo.objects import snapshot_key

_REMEMBERED: Final = 10_000


class Heads:
    """The heads of the sequences used last: what each was last captured to or checked out from. Thread-safe."""

    def __init__(self, repo: Repository) -> None:
        self._repo = repo
        self._lock = threading.Lock()
        self._heads: OrderedDict[str, str] = OrderedDict()

    def of(self, sequence_id: str) -> str | None:
        """HEAD of a sequence."""
        return self._heads.get(sequence_id)

    def set(self, sequence_ids: Iterable[str], cid: str) -> None:
        """Say that sequences continue ``cid``."""
        with self._lock:
            for name in sequence_ids:
                self._heads[name] = cid
                self._heads.move_to_end(name)
            while len(self._heads) > _REMEMBERED:
                self._heads.popitem(last=False)

    def parents(self, heads: Iterable[str | None], branch: str, given: Sequence[str] | None) -> list[str]:
        """The parents of a snapshot that is to move ``branch``.

        Args:
            heads: what is captured continues these; ``None`` among them: nothing.
            branch: its tip becomes a parent, unless the parents descend from it already: what a branch reached once
                stays reachable.
            given: revs to name as parents instead.

        Raises:
            Conflict: the branch's tip is not among the ancestors of ``given``.
            NotFound: one of ``given`` is not there.
        """
        tip = self._repo.refs.read(RefKind.BRANCH, branch)
        if given is not None:
            cids = list(dict.fromkeys(self._repo.resolve(rev) for rev in given))
            if tip is not None and not self._reaches(cids, tip.cid):
                raise Conflict(
                    f"branch {branch} names {tip.cid}, from which the given parents do not descend",
                    hint="take another branch, or leave the parents out",
                )
            return cids
        # a gc may have taken a head that no branch named any more
        cids = list(dict.fromkeys(cid for cid in heads if cid and self._repo.objects.has(snapshot_key(cid))))
        if tip is not None and not self._reaches(cids, tip.cid):
            cids.append(tip.cid)
        return cids

    def _reaches(self, cids: list[str], wanted: str) -> bool:
        if wanted in cids:
            return True
        with contextlib.suppress(NotFound):  # an ancestor that was pruned: nothing behind it is reached
            return wanted in ancestors(cids, lambda cid: self._repo.objects.snapshot(cid).parents)
        return False
