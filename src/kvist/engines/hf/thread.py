"""The engine's thread, and how other threads stop it between two steps.

Knows threads and the scheduler. Must not know prompts, limits or models.

Two rules keep it safe. Only the engine's thread steps; and everybody else who touches tables pauses it first, which
waits for the step in flight, holds off the next, and keeps out every other thread. A new sequence needs neither: it is
left in an inbox.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Final, Self

from kvist.engines.hf.scheduler import Scheduler
from kvist.engines.hf.sequence import Sequence
from kvist.errors import Conflict, EngineError

_STALL_S: Final = 0.01


class EngineThread:
    """Steps a scheduler. Use as a context manager, or `start` and `close` it.

    Attributes:
        scheduler: tables and turns; touch it in `exclusive` only.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._inbox: list[Sequence] = []
        self._arrivals = count()
        self._pauses = 0
        self._pauser: int | None = None  # the thread that the pauses belong to
        self._stepping = False
        self._owed = False  # the engine has a turn coming before the next pause
        self._closed = False

    def enqueue(self, seq: Sequence) -> None:
        """Hand over a new sequence, which has its name and its request.

        Raises:
            Conflict: a sequence of that name is live.
            EngineError: the engine is closed.
        """
        with self._wake:
            if self._closed:
                raise EngineError("the engine is closed")
            if seq.id in self.scheduler.live_names:
                raise Conflict(f"a sequence {seq.id!r} is live; wait for it, cancel it, or use another name")
            self.scheduler.live_names.add(seq.id)
            seq.arrival = next(self._arrivals)
            self._inbox.append(seq)
            self._wake.notify_all()

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Start the engine's thread; nothing if it runs."""
        with self._wake:
            if self._closed:
                raise EngineError("the engine is closed; load it again")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="kvist-engine", daemon=True)
                self._thread.start()
        return self

    def close(self) -> None:
        """Stop after the step in flight. Requests that are not done raise `EngineError`. May be called twice.

        Waits for a thread that has paused the engine to resume it.

        Raises:
            EngineError: called from the engine's own thread (an ``on_step``), which would wait for itself.
        """
        if threading.current_thread() is self._thread:
            raise EngineError("the engine cannot be closed from its own thread (an on_step callback)")
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
        with self.exclusive() as scheduler:
            scheduler.fail_all(EngineError("the engine was closed"))

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._closed and (self._pauses or not (self._inbox or any(self.scheduler.live()))):
                    if not self._pauses:
                        self._settle_turn()
                    self._wake.wait()
                self._settle_turn()
                if self._closed:
                    return
                self._empty_inbox()
                self._stepping = True
            stalled = False
            try:
                stalled = not self.scheduler.step()
            except Exception as error:  # our own bug, outside any one request: fail them, stay alive
                self.scheduler.fail_all(EngineError(f"the scheduler failed: {error!r}"))
            finally:
                with self._wake:
                    self._stepping = False
                    self._wake.notify_all()
                    if stalled and not self._closed:
                        # Letting go of slots notifies; cancelling a request does not.
                        self._wake.wait(_STALL_S)

    def _settle_turn(self) -> None:
        self._owed = False
        self._wake.notify_all()

    def _empty_inbox(self) -> None:
        for seq in self._inbox:
            self.scheduler.add(seq)
        self._inbox.clear()

    # -- stopping between steps ----------------------------------------------------------------------------------

    def pause(self) -> None:
        """Return when no step is in flight; none begins until `resume`, and streams just stall.

        A pause belongs to its thread: it nests there, only that thread can resume it, and whatever else touches
        tables (`exclusive`, `submit` with ``resume``, other pauses) waits for it. So a thread that pauses finds the
        tables as its last call left them.

        Between the end of one pause and the start of the next, whichever threads they are of, the engine computes a
        tile if it has one to compute.

        Raises:
            EngineError: called from the engine's own thread (an ``on_step``), which would wait for itself.
        """
        if threading.current_thread() is self._thread:
            raise EngineError("the engine cannot be paused from its own thread (an on_step callback)")
        me = threading.get_ident()
        with self._wake:
            while self._pauser != me and (self._pauser is not None or self._owed):
                self._wake.wait()
            self._pauser = me
            self._pauses += 1
            while self._stepping:
                self._wake.wait()

    def resume(self) -> None:
        """Undo one `pause` of this thread.

        Raises:
            EngineError: this thread has not paused the engine.
        """
        with self._wake:
            if self._pauser != threading.get_ident():
                raise EngineError("the engine is not paused by this thread")
            self._pauses -= 1
            if not self._pauses:
                self._pauser = None
                self._owed = self._thread is not None and not self._closed
                self._wake.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[Scheduler]:
        """The scheduler and the pool, with no step in flight and no other thread in here."""
        self.pause()
        try:
            with self._wake:
                self._empty_inbox()
            yield self.scheduler
        finally:
            self.resume()

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless references, free list, index and tables agree; for tests."""
        with self.exclusive() as scheduler, self._wake:
            self._empty_inbox()  # `submit` may have left another one meanwhile; now it cannot
            scheduler.check()
