"""Prefix cache: the full blocks that the engines of one layout ever computed, kept in a repository and found by hash.

Knows block hashes, digests, a bound in bytes and a policy. Must not know how an engine computes a block hash, nor how
pages get from and into its memory.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kvist.blocks.policy import Policy
from kvist.errors import (
    Conflict,
    DamagedPage,
    IntegrityError,
    InvalidInput,
    KvistError,
    Locked,
    MissingPage,
    NotFound,
    RepositoryNotFound,
)
from kvist.hashing import Buffer
from kvist.layout import Layout
from kvist.pager.chain import Chain, Change, Halves, Key, Tip
from kvist.repo.repository import Repository

ATTEMPTS: Final = 8
"""How often a flush tries to get its snapshot onto the branch."""
LINKS: Final = 16
"""Snapshots in a chain above which a flush merges the last ones into its own."""
SLACK: Final = 8
"""An eviction frees one part in so many of the bound, so that the next flushes need none."""

_BLOCK: Final = re.compile(r"(?:[0-9a-f]{2}){4,64}")


@dataclass(frozen=True, slots=True)
class Flushed:
    """Result of a flush.

    Attributes:
        cid: the snapshot that was committed; ``None``: there was nothing to commit.
        blocks: blocks that it made durable.
        new_bytes: bytes of page halves that the repository did not have yet.
        evicted: blocks that were evicted, some perhaps before they were ever stored.
        is_base: whether the snapshot replaced the whole chain.
        attempts: 1, and one more for each time that another writer, or a gc, came first.
    """

    cid: str | None
    blocks: int
    new_bytes: int
    evicted: int
    is_base: bool
    attempts: int


class PrefixCache:
    """The durable prefix cache of one tensor-parallel rank.

    The branch ``cache/<fingerprint>`` names all blocks; several servers of equal layouts share it. Each writes by
    compare-and-swap, so that none loses what another has committed. Nothing is known before the first `refresh`.

    **What ``max_bytes`` bounds**: the bytes of the distinct page halves that the branch names when a flush returns.
    A flush that would exceed it evicts blocks in the policy's order, `SLACK` of the bound at once, and writes a new
    base without them. It does not bound what the store holds: an evicted page becomes garbage, and its space is free
    when a ``kvist gc`` finds the page older than its minimal age (an hour, see `kvist.repo.gc.MIN_AGE`) and less than
    half of its segment alive. So plan for the bound twice, and for what is written in the time between two runs of gc.
    Servers on one branch get one bound: the smallest rules. Each evicts by the use that it has seen itself; the order
    of a base tells the others how hot its writer found each block.

    **Memory**: about 0.7 KB a block. `add` keeps the caller's buffers, not a copy, until a flush has committed them:
    a page that is stored and that nothing names may be taken by a gc, and then has to be stored again. They are stored
    by the flush and not by `add`, so that the pages of many requests share one segment and one barrier.

    Equal layouts are all that makes blocks interchangeable here: their snapshots record no numerics, and of two servers
    that computed one block the first to commit it is the one whose bits both load from then on.

    Safe from several threads: lookups never wait for the store. A store that fails leaves lookups as they were.
    """

    def __init__(
        self,
        repo: Repository,
        layouts: Sequence[Layout],
        *,
        max_bytes: int | None,
        policy: Policy[Key],
        wait: Callable[[float], object] = time.sleep,
    ) -> None:
        """Make an empty view of the cache; reads nothing.

        Args:
            repo: where the cache lies; not closed by this object.
            layouts: of all groups of this rank, in order.
            max_bytes: the bound, see above; ``None``: there is none.
            policy: empty, and from now on this object's own.
            wait: called with seconds before a flush tries again.

        Raises:
            InvalidInput: layouts that are not one rank's, a bound smaller than a block, or a policy in use.
        """
        self._chain: Final = Chain(repo, layouts)
        self._sizes: Final = tuple(2 * layout.page_bytes for layout in layouts)
        if max_bytes is not None and max_bytes < max(self._sizes):
            raise InvalidInput(f"a prefix cache holds at least one block of {max(self._sizes)} bytes, got {max_bytes}")
        if len(policy):
            raise InvalidInput(f"the policy of a prefix cache is its own, got one that holds {len(policy)} keys")
        self._repo: Final = repo
        self._max_bytes: Final = max_bytes
        self._wait: Final = wait
        self._flushing: Final = threading.Lock()
        self._lock: Final = threading.Lock()  # of everything below; never held while the store is asked
        self._policy: Final = policy  # holds the keys of _blocks and _pending
        self._tip = Tip()
        self._blocks: dict[Key, Halves] = {}
        self._uses: Counter[str] = Counter()  # blocks that name a digest
        self._bytes = 0
        self._pending: dict[Key, tuple[Buffer, Buffer]] = {}
        self._dropped: dict[Key, Halves] = {}  # on the branch, and no good
        self._has_evicted = False  # the branch names what is not in _blocks

    @property
    def branch(self) -> str:
        """The branch that names the blocks."""
        return self._chain.branch

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct page halves of all blocks that can be found."""
        return self._bytes

    @property
    def pending_bytes(self) -> int:
        """Bytes of the buffers that wait for a flush."""
        with self._lock:
            return self._pending_bytes()

    # -- finding -------------------------------------------------------------------------------------------------

    def refresh(self) -> int:
        """Learn what other servers have committed, or evicted; how many blocks are new. One read if nothing moved.

        A branch that somebody deleted takes all its blocks with it. What others committed is not bounded before the
        next flush.

        Raises:
            KvistError: see `Chain.look`; what was known stays.
        """
        while True:
            tip = self._tip
            change = self._chain.look(tip)
            if change is None:
                return 0
            if self._dropped:
                self._repo.pages.refresh()  # somebody may have healed them
            with self._lock:
                if self._tip is tip:
                    return self._adopt(change)

    def find(self, group: int, block: str) -> Halves | None:
        """Digests of a block's page halves, K and V; ``None`` where no snapshot is known to name it.

        To read them is `Repository.get_pages`; if that finds one damaged or missing, tell `drop`.
        """
        return self._blocks.get((group, block))

    def __contains__(self, key: object) -> bool:
        """Whether `find` finds the block ``(group, block hash)``."""
        return key in self._blocks

    def __len__(self) -> int:
        """How many blocks can be found."""
        return len(self._blocks)

    def __iter__(self) -> Iterator[Key]:
        """The blocks that can be found now, in no order."""
        with self._lock:
            return iter(tuple(self._blocks))

    def missing(self, group: int, blocks: Iterable[str]) -> list[str]:
        """Those that neither can be found nor wait for a flush: what is worth copying out of an engine."""
        with self._lock:
            return [block for block in blocks if (group, block) not in self._policy]

    def touch(self, blocks: Sequence[Key]) -> None:
        """Note that a request used these blocks, its root first. Blocks that are not known are passed over."""
        with self._lock:
            self._policy.touch([key for key in blocks if key in self._policy])

    def drop(self, group: int, block: str) -> bool:
        """Forget a block of which a page was found damaged or missing; whether it was known.

        The next flush writes a base without it, since a gc refuses to work while a branch names a damaged page. The
        block may be added again, which heals its pages.
        """
        with self._lock:
            return self._drop((group, block))

    # -- adding --------------------------------------------------------------------------------------------------

    def add(self, group: int, entries: Sequence[tuple[str, Buffer, Buffer]]) -> int:
        """Take in blocks that the engine has filled; how many were new. Nothing is stored yet.

        Args:
            group: whose blocks.
            entries: block hash, K half and V half of each, a request's root first. The buffers are contiguous and as
                long as the layout says; they are kept, and must not change before a flush has returned without an
                error, or `discard` and the flush that was then under way.

        Raises:
            InvalidInput: no such group, no block hash, or a buffer of another length; nothing was added.
        """
        if not 0 <= group < len(self._sizes):
            raise InvalidInput(f"there are {len(self._sizes)} groups, got group {group}")
        offered: dict[Key, tuple[Buffer, Buffer]] = {}
        for block, *halves in entries:
            if not _BLOCK.fullmatch(block):
                raise InvalidInput(f"a block hash is 8 to 128 lower-case hex digits, got {block!r:.80}")
            for half in halves:
                if 2 * memoryview(half).nbytes != self._sizes[group]:
                    raise InvalidInput(
                        f"a page half of group {group} has {self._sizes[group] // 2} bytes, "
                        f"got {memoryview(half).nbytes} for block {block}"
                    )
            offered.setdefault((group, block), (halves[0], halves[1]))
        with self._lock:
            new = {key: halves for key, halves in offered.items() if key not in self._policy}
            self._policy.insert(list(new))
            self._pending.update(new)
        return len(new)

    def discard(self) -> int:
        """Give up what waits for a flush, and let go of its buffers; how many blocks. For when the store stays away.

        A flush that is under way still writes what it has begun with, and needs its buffers until it returns.
        """
        with self._lock:
            self._policy.remove(self._pending)
            lost = len(self._pending)
            self._pending.clear()
        return lost

    def flush(self) -> Flushed:
        """Store and commit what was added, and evict what is too much.

        Raises:
            Conflict: other writers, or a gc, were first `ATTEMPTS` times.
            RepositoryNotFound, StoreError, StoreFull: the store is gone, fails or is full.
            KvistError: the branch cannot be read, see `Chain.look`.

        After an error what was added still waits for the next flush; nothing that was committed is lost.
        """
        failed: KvistError | None = None
        evicted = new_bytes = 0
        with self._flushing:
            for attempt in range(1, ATTEMPTS + 1):
                if attempt > 2:  # who lost a race for the branch may try again at once; who met a gc had better wait
                    self._wait(min(0.005 * 2**attempt, 0.5))
                self.refresh()
                evicted += self._evict()
                with self._lock:
                    tip, batch = self._tip, dict(self._pending)
                    is_base = self._has_evicted or bool(self._dropped)
                # again: it is a page of the chain that nobody needs any more, but that no new link may follow
                is_base |= attempt > 2 and isinstance(failed, IntegrityError)
                if not batch and not is_base:
                    return Flushed(None, 0, new_bytes, evicted, False, attempt)
                keep = 0 if is_base else _kept([link.blocks for link in tip.links], len(batch))
                try:
                    stored, stored_bytes = self._store(batch)
                    new_bytes += stored_bytes
                    named = self._compose(tip, keep, stored)
                    if named is None:
                        continue
                    done = self._chain.publish(tip, keep, named, _message(len(batch), evicted, keep, len(named)))
                except (Locked, RepositoryNotFound):
                    raise
                except (Conflict, NotFound) as error:
                    failed = error
                except (MissingPage, DamagedPage) as error:  # of this batch: stored again; of another: given up
                    failed = error
                    self._drop_absent()
                else:
                    self._settle(tip, done, stored, named if keep == 0 else None)
                    cid = done.links[-1].cid
                    return Flushed(cid, len(stored), new_bytes, evicted, keep == 0, attempt)
        raise Conflict(
            f"branch {self.branch} could not be moved in {ATTEMPTS} attempts: {failed or 'it moved each time'}",
            hint="flush again; what was added still waits",
        ) from failed

    # -- steps of a flush ----------------------------------------------------------------------------------------

    def _evict(self) -> int:
        """Forget what is too much, as if no two pending pages were equal; how many blocks."""
        if self._max_bytes is None:
            return 0
        low = max(self._max_bytes - self._max_bytes // SLACK, *self._sizes)
        evicted = 0
        with self._lock:
            pending = self._pending_bytes()
            if self._bytes + pending <= self._max_bytes:
                return 0
            while self._bytes + pending > low:
                (key,) = self._policy.evict(1)
                evicted += 1
                if key in self._pending:
                    del self._pending[key]
                    pending -= self._sizes[key[0]]
                else:
                    self._release(key)
                    self._has_evicted = True
        return evicted

    def _store(self, batch: Mapping[Key, tuple[Buffer, Buffer]]) -> tuple[dict[Key, Halves], int]:
        if not batch:
            return {}, 0
        put = self._repo.put_pages([half for halves in batch.values() for half in halves])
        halves = zip(put.digests[::2], put.digests[1::2], strict=True)
        return dict(zip(batch, halves, strict=True)), put.new_bytes

    def _compose(self, tip: Tip, keep: int, stored: Mapping[Key, Halves]) -> dict[Key, Halves] | None:
        """What the new snapshot names, the hottest first; ``None`` if another thread has learnt of another tip."""
        links = tip.links[keep:] if keep else ()  # of a base everything is in memory
        merged = {key: halves for link in links for key, halves in self._chain.blocks(link.cid).items()}
        with self._lock:
            if self._tip is not tip:
                return None
            if keep == 0:
                wanted = dict(self._blocks)
            else:
                wanted = {key: halves for key, halves in merged.items() if self._blocks.get(key) == halves}
            wanted.update(stored)
            order = [key for key in self._policy if key in wanted]
        return {key: wanted[key] for key in reversed(order)} | wanted  # last what was discarded meanwhile

    def _settle(self, tip: Tip, done: Tip, stored: Mapping[Key, Halves], base: Mapping[Key, Halves] | None) -> None:
        """Note that a snapshot was published; unless a refresh has seen it first, in another thread."""
        with self._lock:
            if self._tip is not tip:
                return
            self._tip = done
            for key, halves in stored.items():
                self._pending.pop(key, None)
                if key not in self._policy:  # discarded meanwhile
                    self._policy.insert([key])
                self._hold(key, halves)
            if base is not None:
                self._has_evicted = False
                self._dropped = {key: halves for key, halves in self._dropped.items() if base.get(key) == halves}

    def _drop_absent(self) -> None:
        with self._lock:
            for key, halves in list(self._blocks.items()):
                if self._is_absent(halves):
                    self._drop(key)

    # -- memory; all under the lock ------------------------------------------------------------------------------

    def _adopt(self, change: Change) -> int:
        """Take over what a branch names now; how many blocks are new."""
        named = {key for added in change.added for key in added}
        known = self._blocks if change.removed is None else change.removed & self._blocks.keys()
        gone = [key for key in known if key not in named]
        for key in gone:
            self._release(key)
        self._policy.remove(gone)
        if change.removed is None:
            self._has_evicted = False
            self._dropped = {key: halves for key, halves in self._dropped.items() if key in named}
        new = 0
        for added in change.added:
            arrived = []
            for key, halves in added.items():
                if self._dropped.get(key) == halves and self._is_absent(halves):
                    continue
                if key not in self._blocks:
                    new += 1
                    if self._pending.pop(key, None) is None:
                        arrived.append(key)
                self._hold(key, halves)
            self._policy.insert(arrived)
        self._tip = change.tip
        return new

    def _hold(self, key: Key, halves: Halves) -> None:
        if key in self._blocks:
            self._release(key)
        self._dropped.pop(key, None)
        self._blocks[key] = halves
        for half in halves:
            self._uses[half] += 1
            if self._uses[half] == 1:
                self._bytes += self._sizes[key[0]] // 2

    def _release(self, key: Key) -> None:
        for half in self._blocks.pop(key):
            self._uses[half] -= 1
            if not self._uses[half]:
                del self._uses[half]
                self._bytes -= self._sizes[key[0]] // 2

    def _drop(self, key: Key) -> bool:
        halves = self._blocks.get(key)
        if halves is None:
            return False
        self._release(key)
        self._policy.remove([key])
        self._dropped[key] = halves
        return True

    def _is_absent(self, halves: Halves) -> bool:
        return any(self._repo.pages.size(half) is None for half in halves)

    def _pending_bytes(self) -> int:
        return sum(self._sizes[group] for group, _ in self._pending)


def _kept(sizes: Sequence[int], new: int) -> int:
    """How many links of a chain stay when ``new`` blocks come; the others are merged with them.

    As long as the chain is short, all. Then the last ones go, as long as one is at most twice what is merged so far:
    so each block is written again only a logarithmic number of times, and a chain has at most `LINKS` and a
    logarithmic number of links, however large its base is.
    """
    keep = len(sizes)
    if keep <= LINKS:
        return keep
    while keep and sizes[keep - 1] <= 2 * new:
        keep -= 1
        new += sizes[keep]
    return keep


def _message(new: int, evicted: int, keep: int, named: int) -> str:
    kind = f"base of {named} blocks" if keep == 0 else f"{named} blocks"
    return f"prefix cache: {kind}, {new} new" + (f", {evicted} evicted" if evicted else "")
