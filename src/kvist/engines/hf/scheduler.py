"""The scheduler: which sequence computes its next tile, out of which slots, and who gives way when the pool is full.

Knows sequences, the pool and the model's tiles. Must not know threads: `kvist.engines.hf.thread` sees to it that one
thread at a time is in here.

Sequences run round-robin, one tile each, never batched together. A new one starts from the longest prefix that the
pool holds: full pages by block hash, then the partly filled page of whichever sequence goes furthest, shared and
copied when written. What a cartridge gives and the pool lacks is copied in before the first tile. When slots run out,
cached pages go first (least recently used), then finished sequences, then the running sequence that came last gives
up its pages and starts again later: the same tokens and, where the model is `canonical`, the same bits.
"""

from __future__ import annotations

import contextlib
from bisect import insort
from collections import Counter, deque
from collections.abc import Iterator
from itertools import chain
from typing import Final

from kvist.engines.hf.cache import PagedCache
from kvist.engines.hf.model import Model
from kvist.engines.hf.pool import PagePool
from kvist.engines.hf.residents import Residents
from kvist.engines.hf.sampling import Row, choose, log_probabilities, most_likely
from kvist.engines.hf.sequence import FinishReason, Sequence, StepOutput
from kvist.errors import KvistError, PoolExhausted

_CANDIDATES: Final = 64
"""Residents looked at for one tail: thousands may share a prefix, and admitting a sequence must stay cheap."""

_FINISHED: Final = 10_000
"""Residents, from which on a sequence that finishes displaces the oldest. Room decides long before, but for sequences
that share every page with others and so need none."""


class Scheduler:
    """Tables and turns.

    Attributes:
        pool: the slots.
        residents: finished and restored sequences. They hold their pages until somebody needs the room.
        running: sequences in turn.
        waiting: sequences without pages, in order of arrival.
        live_names: of the running, the waiting, and those that the engine has not handed over yet.
        steps: tiles computed.
        preemptions: times a running sequence gave up its pages.
    """

    def __init__(self, model: Model, pool: PagePool, *, max_running: int) -> None:
        self.pool = pool
        self.residents = Residents(pool.page_size)
        self.running: deque[Sequence] = deque()
        self.waiting: list[Sequence] = []
        self.live_names: set[str] = set()
        self.steps = 0
        self.preemptions = 0
        self._model = model
        self._cache = PagedCache(pool.data)
        self._size = pool.page_size
        self._max_running = max_running

    def sequences(self) -> Iterator[Sequence]:
        """Every sequence that could be continued: resident, running, and waiting to run again."""
        yield from self.residents
        yield from self.running
        yield from (seq for seq in self.waiting if seq.admitted)

    def find(self, sequence_id: str) -> Sequence | None:
        """The sequence of that name, or ``None``."""
        resident = self.residents.get(sequence_id)
        return resident or next((seq for seq in self.live() if seq.id == sequence_id), None)

    def live(self) -> Iterator[Sequence]:
        """Sequences that somebody waits for."""
        return chain(self.running, self.waiting)

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence."""
        insort(self.waiting, seq, key=lambda other: other.arrival)

    def keep(self, seq: Sequence) -> None:
        """Make a sequence resident; it holds its slots already."""
        self.residents.add(seq)

    def drop(self, seq: Sequence, reason: FinishReason | None = None, error: Exception | None = None) -> None:
        """End a sequence, live or resident, and release its slots; its full pages stay as prefix cache.

        What its request gets is ``error`` if there is one, else the end with ``reason``.
        """
        self.residents.remove(seq)
        for queue in (self.running, self.waiting):
            if seq in queue:
                queue.remove(seq)
        self._release(seq)
        seq.let_go()
        request, seq.request = seq.request, None
        if request is not None:
            self.live_names.discard(seq.id)
            request.finish_reason = reason
            # A callback that fails must not take the engine with it; the sequence is over anyway.
            with contextlib.suppress(Exception):
                request.deliver(error)

    def step(self) -> bool:
        """Compute one tile of the sequence whose turn it is. What goes wrong in it ends that sequence only.

        Returns:
            ``False`` if nothing can be done before a pager lets go of slots (or a request is cancelled).
        """
        for seq in [seq for seq in self.live() if seq.request is not None and seq.request.cancelled]:
            self.drop(seq, reason="cancelled")
        self._admit()
        if not self.running:
            return True
        seq = self.running[0]
        self.running.rotate(-1)
        try:
            if self._take_given(seq) and self._room_for_tile(seq):
                self._compute(seq)
            elif seq in self.running:
                return False
        except Exception as error:
            self.drop(seq, error=error)
        return True

    # -- one tile ------------------------------------------------------------------------------------------------

    def _take_given(self, seq: Sequence) -> bool:
        """Bring what the cartridge gives into the table, all in one turn; ``False`` if it has to wait for room."""
        while seq.computed < seq.given:
            page, row = divmod(seq.computed, self._size)
            is_whole = (page + 1) * self._size <= seq.given
            slot = self.pool.find(seq.hashes(self._size)[page]) if is_whole and not row else None
            if slot is not None:  # another sequence was first
                seq.table.append(self.pool.hold(slot))
            elif self._room_for_tile(seq):
                self._fill(seq, page, min(seq.given - page * self._size, self._size))
            else:
                return False
            seq.computed = min((page + 1) * self._size, seq.given)
            if is_whole and slot is None:
                self._register(seq, page)
        return True

    def _fill(self, seq: Sequence, page: int, rows: int) -> None:
        """Write the cartridge's rows of a page that only ``seq`` sees."""
        assert seq.hold is not None
        slot = seq.table[page]
        self.pool.data[slot, :, :, :rows] = seq.hold.pages[page, :, :, :rows]
        self.pool.filled[slot] = rows

    def _compute(self, seq: Sequence) -> None:
        page, row = divmod(seq.computed, self._size)
        live = seq.token_ids[seq.computed : (page + 1) * self._size]
        slot = seq.table[page]
        logits = self._model.tile(self._cache, seq.table, live, row)
        self.steps += 1
        seq.computed += len(live)
        self.pool.filled[slot] = row + len(live)
        if seq.prefix is not None and seq.computed <= seq.prefix.tokens:
            # The prompt is the cartridge's document and no more, and its last row was computed for the logits. What
            # the block is named after stays the cartridge's, to the last row.
            self._fill(seq, page, row + len(live))
        if row + len(live) == self._size:
            self._register(seq, page)
        if seq.computed == len(seq.token_ids):
            self._emit(seq, logits)

    def _register(self, seq: Sequence, page: int) -> None:
        """Give the page that is now full to the prefix cache, or take over the one that is there already."""
        slot, block = seq.table[page], seq.hashes(self._size)[page]
        twin = self.pool.find(block)
        if twin is None or not self._model.canonical:
            self.pool.register(slot, block)
        else:
            seq.table[page] = self.pool.hold(twin)
            self.pool.release([slot])

    def _emit(self, seq: Sequence, logits: Row) -> None:
        request, params = seq.request, seq.params
        assert request is not None
        if len(seq.token_ids) >= seq.limit:
            return self._finish(seq, "length")
        token = choose(logits, params, seq.draws)
        seq.draws += params.temperature > 0
        seq.token_ids.append(token)
        probabilities = log_probabilities(logits)
        reason: FinishReason | None = None
        if token in params.stop_token_ids or (token in self._model.eos_ids and not params.ignore_eos):
            reason = "stop"
        elif len(seq.token_ids) >= seq.limit:
            reason = "length"
        output = StepOutput(
            token_id=token,
            logprob=float(probabilities[token]),
            top=most_likely(probabilities, params.logprobs) if params.logprobs else (),
            logits=logits if params.logits else None,
            finish_reason=reason,
        )
        if reason is not None:
            return self._finish(seq, reason, output)
        request.deliver(output)
        if request.finishing:
            self._finish(seq, "stop")
        return None

    def _finish(self, seq: Sequence, reason: FinishReason, *last: StepOutput) -> None:
        """Make the sequence resident, and only then say that it ended: who hears it may use its name at once."""
        request, seq.request = seq.request, None
        assert request is not None
        self.running.remove(seq)
        self.live_names.discard(seq.id)
        seq.let_go()
        while len(self.residents) >= _FINISHED:
            self._evict_resident()
        self.keep(seq)
        request.finish_reason = reason
        try:
            for event in (*last, None):
                request.deliver(event)
        except Exception as error:
            # The sequence is over and stays; a listener that failed at its last token is still owed an end.
            with contextlib.suppress(Exception):
                request.deliver(error)

    # -- room ----------------------------------------------------------------------------------------------------

    def _room_for_tile(self, seq: Sequence) -> bool:
        """See to it that the table ends in a page only ``seq`` sees; ``False`` if it has to wait.

        It waits having given way to others, or in place for slots that only pagers hold: a restore in progress.

        Raises:
            PoolExhausted: nobody is left to give way.
        """
        page, row = divmod(seq.computed, self._size)
        while True:
            try:
                if page < len(seq.table):
                    seq.table[page] = self.pool.writable(seq.table[page], row)
                else:
                    seq.table += self.pool.take(1)
                return True
            except PoolExhausted as error:
                if self._evict_resident():
                    continue
                last = max((other for other in self.running if other.table or other is seq), key=lambda o: o.arrival)
                if last is seq and not any(other.table for other in self.running if other is not seq):
                    if self.pool.pinned_only():
                        return False
                    raise PoolExhausted(f"sequence {seq.id} is alone and {error}") from error
                self.running.remove(last)
                self._release(last)
                self.add(last)
                self.preemptions += 1
                if last is seq:
                    return False

    def _admit(self) -> None:
        """Start waiting sequences while there is room for them; the first one in any case if nothing runs."""
        while self.waiting and len(self.running) < self._max_running:
            seq = self.waiting[0]
            self._attach(seq)
            shared_tail = bool(seq.computed % self._size)
            need = len(seq.token_ids) // self._size + 1 - len(seq.table) + shared_tail
            short = need - self.pool.available
            if self.running and short > 0 and short > self._reclaimable(short):
                self._release(seq)
                return
            while need > self.pool.available and self._evict_resident():
                pass
            del self.waiting[0]
            namesake = self.residents.get(seq.id)
            if namesake is not None:
                self.drop(namesake)
            if seq.request is not None and not seq.admitted:
                seq.request.cached_tokens = max(seq.computed, seq.given) - seq.own
            seq.admitted = True
            self.running.append(seq)

    def _attach(self, seq: Sequence) -> None:
        """Share the longest prefix that the pool holds, but for the last token: its logits are to be computed."""
        assert not seq.table and not seq.computed
        size, tokens = self._size, seq.token_ids
        most, hashes = len(tokens) - 1, seq.hashes(size)
        parent = self.find(seq.parent) if seq.parent else None
        if parent is not None and parent.salt != seq.salt:
            parent = None  # the name has moved to another sequence
        known = min(len(parent.token_ids), len(tokens)) if parent is not None else 0
        if parent is not None and parent.table and parent.token_ids[:known] == tokens[:known]:
            # The parent's own pages, even where the prefix cache has others for the same blocks.
            seq.computed = min(parent.computed, known, most)
            seq.table = [self.pool.hold(slot) for slot in parent.table[: -(-seq.computed // size)]]
            self.residents.touch(parent)
            return
        while len(seq.table) < most // size:
            slot = self.pool.find(hashes[len(seq.table)])
            if slot is None:
                break
            seq.table.append(self.pool.hold(slot))
        page = len(seq.table)
        seq.computed = page * size
        tail, rows = self._longest_tail(seq, page, min(size, most - page * size))
        if tail is not None:
            seq.table.append(self.pool.hold(tail))
            seq.computed += rows

    def _longest_tail(self, seq: Sequence, page: int, limit: int) -> tuple[int | None, int]:
        """The slot that holds most of the first ``limit`` tokens of ``page`` after the same prefix, and how many."""
        size = self._size
        best, rows, owner = None, 0, None
        hashes = seq.hashes(size)
        if page < len(hashes) and limit > 0:
            best = self.pool.find(hashes[page])
            rows = limit if best is not None else 0
        wanted = seq.token_ids[page * size : page * size + limit]
        prefix = seq.before(page, size)
        for other in chain(self.running, self.residents.after(prefix, _CANDIDATES)):
            if rows == limit:
                break
            if other.computed <= page * size + rows:
                continue
            if other.before(page, size) != prefix:
                continue
            here = other.token_ids[page * size : min(other.computed, (page + 1) * size)]
            same = next((n for n, (a, b) in enumerate(zip(here, wanted, strict=False)) if a != b), None)
            same = min(len(here), len(wanted)) if same is None else same
            if same > rows:
                best, rows, owner = other.table[page], same, other
        if owner is not None:
            self.residents.touch(owner)
        return best, rows

    def _evict_resident(self) -> bool:
        oldest = next(iter(self.residents), None)
        if oldest is not None:
            self.drop(oldest)
        return oldest is not None

    def make_room(self, count: int) -> None:
        """Evict finished sequences until ``count`` slots can be taken.

        Raises:
            PoolExhausted: that would not be enough; nobody was evicted.
        """
        short = count - self.pool.available
        if short > 0 and short > self._reclaimable(short):
            raise PoolExhausted(
                f"needed {count} slots of {len(self.pool)}; {self.pool.available} are free or evictable and "
                f"{self._reclaimable(len(self.pool))} are held by finished sequences"
            )
        while count > self.pool.available and self._evict_resident():
            pass

    def _reclaimable(self, enough: int) -> int:
        """Slots that would come free if no sequence were resident; counts no further than ``enough``."""
        held: Counter[int] = Counter()
        free = 0
        for slot in chain.from_iterable(seq.table for seq in self.residents):
            held[slot] += 1
            free += held[slot] == self.pool.refs[slot]
            if free >= enough:
                break
        return free

    def _release(self, seq: Sequence) -> None:
        # Last page first: of a prefix, the later pages are evicted before the earlier ones that they need.
        self.pool.release(reversed(seq.table))
        seq.table, seq.computed = [], 0

    def fail_all(self, error: KvistError) -> None:
        """End every live sequence with ``error``."""
        for seq in list(self.live()):
            self.drop(seq, error=error)

    def check(self) -> None:
        """Raise `AssertionError` unless tables, references, states and names agree; for tests."""
        everyone = [*self.residents, *self.running, *self.waiting]
        names = [seq.id for seq in self.sequences()]
        assert len(names) == len(set(names)), "two sequences of one name"
        self.pool.check([seq.table for seq in everyone])
        for seq in everyone:
            assert len(seq.table) == -(-seq.computed // self._size), f"{seq.id}: the table does not fit its tokens"
            assert not seq.token_ids or seq.computed <= len(seq.token_ids), f"{seq.id}: more computed than known"
            rows = seq.computed % self._size
            assert not rows or self.pool.filled[seq.table[-1]] >= rows, f"{seq.id}: the last page lacks rows"
        assert all(seq.request is None for seq in self.residents), "somebody waits for a resident"
        assert all(seq.request is not None for seq in self.live()), "nobody waits for a live sequence"
        assert self.live_names == {seq.id for seq in self.live()}, "the names in use are not those of the live"
        assert all(not seq.table for seq in self.waiting), "a waiting sequence holds slots"
