"""The pager of the embedded engine: its pool's pages in and out, by slot.

Knows the engine's pool and tables, through `Engine.exclusive`. Must not know repositories or files.

A page in the pool is its K half and then its V half, each in the layout's memory order, so to move one is a copy of
one run of bytes; nothing is permuted and no value is cast.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvist.cartridge.placing import VIRTUAL, Prefix
from kvist.engines.hf.owned import AnyEngine, OwnedEngine
from kvist.engines.hf.scheduler import Scheduler
from kvist.engines.hf.sequence import Sequence as Resident
from kvist.engines.hf.sequence import restored
from kvist.errors import Conflict, InvalidInput, NotFound
from kvist.ids import check_name
from kvist.layout import Layout
from kvist.pager import CachePager, LogicalSeq, PageBytes

_Bytes = NDArray[np.uint8]


@dataclass(slots=True)
class _Pin:
    """References this pager holds on a slot since the last install.

    Attributes:
        count: how many.
        shared: the slot was there already, and is not ours to write.
        written: it holds a page.
        block: the hash that came with the page.
    """

    count: int = 1
    shared: bool = False
    written: bool = False
    block: bytes | None = None


class HfPager(CachePager):
    """The `CachePager` of an `Engine`, running or not. Each call holds off the engine's steps by itself; `pause`
    around several for one consistent picture.

    Finished sequences give way to `allocate_pages`, least recently used first, when nothing else is free.
    """

    def __init__(self, engine: AnyEngine, sequences: Collection[str] | None = None) -> None:
        """
        Args:
            engine: whose cache it is; of an owner's view, that owner's sequences only, and none that are kept only as
                prefix cache.
            sequences: names of the sequences to show, and only their pages; ``None`` shows all of them, and the pages
                that are kept only as prefix cache.
        """
        self._engine = engine
        self._owner = engine.owner if isinstance(engine, OwnedEngine) else None
        self._only = None if sequences is None else set(sequences)
        self._pins: dict[int, _Pin] = {}

    def meta(self) -> Layout:
        """The engine's layout."""
        return self._engine.layout

    def numerics(self) -> dict[str, Any]:
        """What besides the layout decides the bits."""
        return self._engine.numerics()

    def pause(self) -> None:
        """Stop the engine between two steps, and keep other threads off it; for this thread to `resume`."""
        self._engine.pause()

    def resume(self) -> None:
        """Undo one `pause`."""
        self._engine.resume()

    # -- out -----------------------------------------------------------------------------------------------------

    def occupied_pages(self) -> list[int]:
        """Slots of the sequences shown, and those of the prefix cache if all are.

        Raises:
            NotFound: a sequence to show is not there.
        """
        with self._engine.exclusive() as scheduler:
            slots = {slot for seq in self._shown(scheduler) for slot in seq.page_ixs}
            if self._only is None and self._owner is None:
                slots.update(self._engine.pool.blocks())
            return sorted(slots)

    def logical_seqs(self) -> list[LogicalSeq]:
        """The sequences shown: finished, restored, running, and waiting to run again.

        Raises:
            NotFound: a sequence to show is not there.
        """
        with self._engine.exclusive() as scheduler:
            return self._shown(scheduler)

    def _shown(self, scheduler: Scheduler) -> list[LogicalSeq]:
        size = self.meta().page_size_tokens
        found = dict(self._named(scheduler))
        missing = sorted((self._only or set()) - found.keys())
        if missing:
            raise NotFound(f"no sequence {missing[0]!r} in the engine: it was evicted, or never was")
        names = found if self._only is None else sorted(self._only)
        return [replace(found[name].logical(size), id=name) for name in names]

    def _named(self, scheduler: Scheduler) -> Iterator[tuple[str, Resident]]:
        """Every sequence of the owner's, and what it is called."""
        if self._owner is not None:
            return self._owner.owned(scheduler.sequences())
        return ((seq.id, seq) for seq in scheduler.sequences())

    def read_page(self, ix: int) -> PageBytes:
        """A copy of the page in slot ``ix``."""
        half = self.meta().page_bytes
        out = bytearray(2 * half)
        self.read_pages([ix], memoryview(out))
        return PageBytes(memoryview(out)[:half], memoryview(out)[half:])

    def read_pages(self, ixs: Sequence[int], out: memoryview) -> None:
        """Copy pages into ``out``; see `CachePager.read_pages`.

        Raises:
            InvalidInput: nothing is stored in one of the slots, or ``out`` has the wrong length.
        """
        target = self._rows(out, len(ixs), "out")
        with self._engine.exclusive():
            for ix in ixs:
                if not self._has_data(ix):
                    raise InvalidInput(f"slot {ix!r} holds no page")
            if not len(ixs):
                return
            data, index = self._pool_bytes(), torch.tensor(list(ixs), device=self._engine.pool.data.device)
            if data.device.type == "cpu":
                torch.index_select(data, 0, index, out=torch.from_numpy(target))
            else:
                target[...] = data.index_select(0, index).cpu().numpy()

    def page_blocks(self, ixs: Sequence[int]) -> list[str | None]:
        """Block hashes of full pages; all ``None`` for a model whose bits are not a function of the tokens."""
        if not self._engine.model.canonical:
            return [None] * len(ixs)
        with self._engine.exclusive():
            blocks = [self._engine.pool.block(ix) for ix in ixs]
            return [None if block is None else block.hex() for block in blocks]

    # -- in ------------------------------------------------------------------------------------------------------

    def allocate_pages(self, n: int) -> list[int]:
        """Take ``n`` slots, evicting cached pages and then finished sequences if need be."""
        if n < 0:
            raise InvalidInput(f"the number of pages must not be negative, got {n}")
        with self._engine.exclusive() as scheduler:
            scheduler.make_room(n)
            slots = self._engine.pool.take(n)
            self._engine.pool.pinned.update(slots)
            self._pins.update((slot, _Pin()) for slot in slots)
            return slots

    def share_pages(self, blocks: Sequence[str | None]) -> list[int | None]:
        """Hold the slots that have these blocks; none for a model whose bits are not a function of the tokens."""
        with self._engine.exclusive():
            return [self._share(_parse_block(block)) for block in blocks]

    def _share(self, block: bytes | None) -> int | None:
        pool = self._engine.pool
        slot = pool.find(block) if block is not None and self._engine.model.canonical else None
        if slot is None:
            return None
        pool.hold(slot)
        pool.pinned[slot] += 1
        if slot in self._pins:
            self._pins[slot].count += 1
        else:
            self._pins[slot] = _Pin(shared=True, written=True, block=block)
        return slot

    def release_pages(self, ixs: Sequence[int]) -> None:
        """Give back one reference to each slot; those that this pager does not hold are left alone."""
        with self._engine.exclusive():
            for ix in ixs:
                if ix in self._pins:
                    self._unpin([ix])

    def write_page(self, ix: int, page: PageBytes) -> None:
        """Fill an allocated slot."""
        half = self.meta().page_bytes
        if len(page.k) != half or len(page.v) != half:
            raise InvalidInput(f"expected two halves of {half} bytes, got {len(page.k)} and {len(page.v)}")
        self.write_pages([ix], memoryview(bytes(page.k) + bytes(page.v)), [None])

    def write_pages(self, ixs: Sequence[int], data: memoryview, blocks: Sequence[str | None]) -> None:
        """Fill allocated slots; see `CachePager.write_pages`.

        Raises:
            InvalidInput: a slot is not this pager's to write, or a length or hash is wrong; nothing was written.
        """
        if len(blocks) != len(ixs):
            raise InvalidInput(f"expected {len(ixs)} block hashes, got {len(blocks)}")
        hashes = [_parse_block(block) for block in blocks]
        source = self._rows(data, len(ixs), "data")
        with self._engine.exclusive():
            for ix in ixs:
                if ix not in self._pins or self._pins[ix].shared:
                    raise InvalidInput(f"slot {ix!r} was not allocated by this pager since its last install")
            pool = self._engine.pool
            if pool.data.device.type == "cpu":
                self._pool_bytes().numpy()[list(ixs)] = source
            else:
                index = torch.tensor(list(ixs), device=pool.data.device)
                self._pool_bytes().index_copy_(0, index, torch.from_numpy(source.copy()).to(pool.data.device))
            for ix, block in zip(ixs, hashes, strict=True):
                self._pins[ix].written, self._pins[ix].block = True, block
                pool.filled[ix] = pool.page_size

    def install_logical_seqs(self, seqs: Sequence[LogicalSeq]) -> None:
        """Make ``seqs`` resident: each can be resumed by name, and found by a prompt that starts with its ids,
        unless its state says that other numerics computed it (`kvist.pager.carry.NUMERICS`).

        Raises:
            Conflict: a sequence of that id is in the engine, or twice in ``seqs``.
            InvalidInput: a sequence cannot be right: its name, its fill, its ids, a slot that this pager did not
                allocate and write or share, or a page under another block's hash. Nothing was installed.
        """
        with self._engine.exclusive() as scheduler:
            names = set(scheduler.live_names) | {seq.id for seq in scheduler.sequences()}
            blocks: dict[int, bytes] = {}
            residents: list[Resident] = []
            for seq in seqs:
                inner = check_name(seq.id) if self._owner is None else self._owner.inner(check_name(seq.id))
                if inner in names:
                    raise Conflict(f"a sequence {seq.id!r} is in the engine already")
                names.add(inner)
                self._check_seq(seq)
                salt = "" if self._owner is None else self._owner.salt
                residents.append(restored(replace(seq, id=inner), self.meta().page_size_tokens, salt))
                self._claim_blocks(residents[-1], blocks)
            pool, rows = self._engine.pool, self._rows_used(seqs)
            for slot, used in rows.items():
                if not self._pins[slot].shared:
                    pool.trim(slot, used)
            for slot, pin in self._pins.items():
                whole = rows.get(slot, pool.page_size) == pool.page_size
                # Without token ids, or without a sequence, the hash that came with the page says what it is.
                block = blocks.get(slot, pin.block if whole else None)
                if block is not None and pin.written and not pin.shared:
                    pool.register(slot, block)
            for seq in seqs:
                for slot in seq.page_ixs:
                    pool.hold(slot)
            self._unpin([slot for slot, pin in self._pins.items() for _ in range(pin.count)])
            for resident in residents:
                scheduler.keep(resident)

    def _check_seq(self, seq: LogicalSeq) -> None:
        size = self.meta().page_size_tokens
        fill, cached = seq.fill_in_last_page, seq.cached_tokens(size)
        if not 0 <= fill < size or (fill and not seq.page_ixs):
            raise InvalidInput(f"sequence {seq.id!r} has fill {fill} in {len(seq.page_ixs)} pages of {size} tokens")
        if len(set(seq.page_ixs)) != len(seq.page_ixs):
            raise InvalidInput(f"sequence {seq.id!r} names a slot twice")
        if seq.token_ids and len(seq.token_ids) < cached:
            raise InvalidInput(f"sequence {seq.id!r} has {cached} cached tokens and {len(seq.token_ids)} token ids")
        vocab, prefix = self._engine.model.vocab, Prefix.of_state(seq.state)
        given = prefix.tokens if prefix is not None else 0
        if seq.token_ids and len(seq.token_ids) < given:
            raise InvalidInput(
                f"sequence {seq.id!r} begins with a cartridge of {given} tokens, and has {len(seq.token_ids)}"
            )
        virtual = given if prefix is not None and seq.token_ids[:given] == (VIRTUAL,) * given else 0
        if virtual and not (prefix is not None and prefix.placed and len(seq.token_ids) > given):
            raise InvalidInput(
                f"sequence {seq.id!r} has a cartridge without token ids, which must be placed before at least one "
                f"token of its own"
            )
        if not all(0 <= token < vocab for token in seq.token_ids[virtual:]):
            raise InvalidInput(f"sequence {seq.id!r} has token ids that are not in [0, {vocab})")
        for slot in seq.page_ixs:
            if slot not in self._pins or not self._pins[slot].written:
                raise InvalidInput(
                    f"sequence {seq.id!r} names slot {slot}, which this pager did not allocate and write"
                )

    def _claim_blocks(self, seq: Resident, blocks: dict[int, bytes]) -> None:
        """Note which block each full page of ``seq`` is, by its ids and salt, and refuse a page that says otherwise."""
        size = self.meta().page_size_tokens
        for slot, block in zip(seq.table[: seq.computed // size], seq.hashes(size), strict=False):
            told = blocks.setdefault(slot, self._pins[slot].block or block)
            if told != block:
                raise InvalidInput(
                    f"slot {slot} of sequence {seq.id!r} holds the page of block {told.hex()}, and its token ids "
                    f"make block {block.hex()}"
                )

    def _rows_used(self, seqs: Iterable[LogicalSeq]) -> dict[int, int]:
        """For each slot that is named: rows that hold tokens of some sequence."""
        size = self.meta().page_size_tokens
        used: dict[int, int] = {}
        for seq in seqs:
            for number, slot in enumerate(seq.page_ixs):
                last = number == len(seq.page_ixs) - 1
                rows = seq.fill_in_last_page if last and seq.fill_in_last_page else size
                used[slot] = max(used.get(slot, 0), rows)
        return used

    def _unpin(self, slots: Sequence[int]) -> None:
        pool = self._engine.pool
        for slot in slots:
            pool.pinned[slot] -= 1
            self._pins[slot].count -= 1
            if not self._pins[slot].count:
                del self._pins[slot]
        pool.release(reversed(slots))

    # -- bytes ---------------------------------------------------------------------------------------------------

    def _has_data(self, ix: int) -> bool:
        pool, pin = self._engine.pool, self._pins.get(ix)
        if not 0 <= ix < len(pool):
            return False
        if pin is not None:
            return pin.written
        # Pinned by another pager and by nobody else: not a page yet.
        return pool.refs[ix] > pool.pinned[ix] or pool.block(ix) is not None

    def _pool_bytes(self) -> torch.Tensor:
        """The pool as ``[slots, 2 * page_bytes]`` bytes; a view."""
        data = self._engine.pool.data
        return data.view(len(self._engine.pool), -1).view(torch.uint8)

    def _rows(self, buffer: memoryview, count: int, name: str) -> _Bytes:
        expected = count * 2 * self.meta().page_bytes
        if buffer.nbytes != expected:
            raise InvalidInput(f"{name} must have {expected} bytes for {count} pages, got {buffer.nbytes}")
        return np.frombuffer(buffer, dtype=np.uint8).reshape(count, 2 * self.meta().page_bytes)


def _parse_block(block: str | None) -> bytes | None:
    if block is None:
        return None
    try:
        raw = bytes.fromhex(block)
    except ValueError:
        raw = b""
    if len(raw) != 32 or block != raw.hex():
        raise InvalidInput(f"expected a block hash of 64 lower-case hex digits, got {block!r:.80}")
    return raw
