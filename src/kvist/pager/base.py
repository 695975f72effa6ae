"""The `CachePager` contract: what an engine must offer so that its paged KV cache can be captured and restored.

Knows pages, slots and sequences of *one* engine. Must not know repositories, files or HTTP.

Vocabulary: a *slot* is a place in the engine's pool, named by an index ``ix``; a *page* is the bytes in it, a K half
and a V half of ``meta().page_bytes`` bytes each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvist.layout import Layout
from kvist.repo.manifest import LogicalSeq


@dataclass(frozen=True, slots=True)
class PageBytes:
    """One page as two opaque byte strings, each ``meta().page_bytes`` long."""

    k: bytes | memoryview
    v: bytes | memoryview


class CachePager(ABC):
    """The paged KV cache of one engine (one group of layers of one tensor-parallel rank of it).

    The nine abstract methods are the whole contract. The others have a correct slow body; an engine overrides them
    for speed, to deduplicate by block hash, and to free what an aborted restore allocated.

    Calls come from one thread at a time. `pause` and `resume` nest: the engine goes on when the last `pause` is undone.
    """

    # -- the contract --------------------------------------------------------------------------------------------

    @abstractmethod
    def meta(self) -> Layout:
        """The layout of every page of this engine. Constant."""

    @abstractmethod
    def pause(self) -> None:
        """Return when the engine has stopped between two steps: pages and tables stay put until `resume`.

        Also against other pagers of the same engine, in other threads: their `pause` waits until this one is undone.
        """

    @abstractmethod
    def resume(self) -> None:
        """Undo one `pause`."""

    @abstractmethod
    def occupied_pages(self) -> list[int]:
        """Slots that hold valid data, ascending: those of sequences, and those kept only as prefix cache."""

    @abstractmethod
    def logical_seqs(self) -> list[LogicalSeq]:
        """Every sequence the engine could go on with, in any order."""

    @abstractmethod
    def read_page(self, ix: int) -> PageBytes:
        """A copy of the page in slot ``ix``.

        Raises:
            InvalidInput: nothing is stored there.
        """

    @abstractmethod
    def allocate_pages(self, n: int) -> list[int]:
        """Take ``n`` free slots and return them in the order in which they should be filled.

        All or nothing. The slots hold no valid data yet and are nobody's until `install_logical_seqs` names them.

        Raises:
            PoolExhausted: fewer than ``n`` slots can be had; none was taken.
        """

    @abstractmethod
    def write_page(self, ix: int, page: PageBytes) -> None:
        """Fill slot ``ix``, which `allocate_pages` has returned and `install_logical_seqs` has not yet named.

        The engine copies; the caller keeps the buffers.

        Raises:
            InvalidInput: a half has the wrong length, or ``ix`` is not such a slot.
        """

    @abstractmethod
    def install_logical_seqs(self, seqs: Sequence[LogicalSeq]) -> None:
        """Make ``seqs`` sequences of the engine, beside those it has. Called once, after all writes; all or nothing.

        The slots they name were allocated, or shared, since the last install. From now on each slot belongs to the
        sequences that name it; a slot named by none of them is freed, or kept as prefix cache if it has a block hash.

        Raises:
            Conflict: a sequence of that id is live, or two of ``seqs`` have one id; nothing was installed.
        """

    # -- optional fast paths -------------------------------------------------------------------------------------

    def numerics(self) -> dict[str, Any]:
        """What besides the layout decides the bits (threads, kernels, library versions); ``{}`` if unknown."""
        return {}

    def page_blocks(self, ixs: Sequence[int]) -> list[str | None]:
        """The block hash (lower-case hex) of each slot's page; ``None`` where it is not full or not known.

        An engine that reports a hash promises that *in this engine* the bytes of the page never change, and that
        two slots with one hash hold interchangeable bytes. Default: all ``None``.
        """
        return [None] * len(ixs)

    def read_pages(self, ixs: Sequence[int], out: memoryview) -> None:
        """Copy pages into ``out`` (writable, contiguous bytes), K then V of each, in the order of ``ixs``.

        ``len(out)`` is ``len(ixs) * 2 * meta().page_bytes``. The engine keeps no reference to ``out``.
        """
        half = self.meta().page_bytes
        for n, ix in enumerate(ixs):
            page = self.read_page(ix)
            out[2 * n * half : (2 * n + 1) * half] = page.k
            out[(2 * n + 1) * half : (2 * n + 2) * half] = page.v

    def write_pages(self, ixs: Sequence[int], data: memoryview, blocks: Sequence[str | None]) -> None:
        """Fill allocated slots from ``data``, laid out as in `read_pages`.

        ``blocks`` gives each page's block hash where it is known, so that a prefix cache can find the page.
        """
        half = self.meta().page_bytes
        for n, ix in enumerate(ixs):
            k = data[2 * n * half : (2 * n + 1) * half]
            v = data[(2 * n + 1) * half : (2 * n + 2) * half]
            self.write_page(ix, PageBytes(k, v))

    def share_pages(self, blocks: Sequence[str | None]) -> list[int | None]:
        """Slots that already hold these blocks, each with one more reference; ``None`` where none does.

        A shared slot stays until `install_logical_seqs` takes it over or `release_pages` gives it back.
        Default: nothing is shared.
        """
        return [None] * len(blocks)

    def release_pages(self, ixs: Sequence[int]) -> None:
        """Give back slots that `allocate_pages` or `share_pages` returned and no install has named.

        Default: nothing; without it an aborted restore leaks its slots.
        """
        return
