"""The engine: one thread that computes tiles, and the calls that other threads make to it.

Knows threads, requests and limits. Must not know how tiles, tables or turns work: `kvist.engines.hf.scheduler` does.

Two rules keep it safe. Only the engine's thread steps; and everybody else who touches tables pauses it first, which
waits for the step in flight, holds off the next, and keeps out every other thread. `submit` needs neither: it leaves
the sequence in an inbox.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Ids
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Final, Self

import torch

from kvist.engines.hf.model import Model
from kvist.engines.hf.pool import PagePool
from kvist.engines.hf.sampling import SamplingParams
from kvist.engines.hf.scheduler import Scheduler
from kvist.engines.hf.sequence import Event, Request, Sequence, SequenceInfo, continuation
from kvist.errors import Conflict, EngineError, InvalidInput, NotFound
from kvist.ids import check_name
from kvist.layout import Layout

_STALL_S: Final = 0.01


class Engine:
    """A causal LM with a paged, shared KV pool. Use as a context manager, or `start` and `close` it.

    Attributes:
        model: the loaded model.
        pool: its slots; touch it in `exclusive` only.
        scheduler: tables and turns; touch it in `exclusive` only.
        max_model_len: tokens a sequence may have, prompt and output together.
    """

    def __init__(
        self,
        model: Model,
        *,
        pages: int = 1024,
        max_model_len: int | None = None,
        max_running: int = 64,
    ) -> None:
        for name, value in (
            ("pages", pages),
            ("max_model_len", 1 if max_model_len is None else max_model_len),
            ("max_running", max_running),
        ):
            if value < 1:
                raise InvalidInput(f"{name} must be at least 1, got {value}")
        self.model = model
        self.pool = PagePool(model.layout, pages, model.device)
        self.scheduler = Scheduler(model, self.pool, max_running=max_running)
        longest = min((n for n in (model.max_positions, max_model_len) if n is not None), default=2**31)
        self._longest = longest
        self.max_model_len = min(longest, pages * model.layout.page_size_tokens)
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._inbox: list[Sequence] = []
        self._arrivals = count()
        self._pauses = 0
        self._pauser: int | None = None  # the thread that the pauses belong to
        self._stepping = False
        self._owed = False  # the engine has a turn coming before the next pause
        self._closed = False

    @classmethod
    def load(
        cls,
        model_dir: str | Path,
        *,
        device: str = "cpu",
        dtype: str | None = None,
        pages: int = 1024,
        page_size_tokens: int = 16,
        threads: int | None = None,
        name: str | None = None,
        max_model_len: int | None = None,
        max_running: int = 64,
    ) -> Self:
        """Load a model and make its pool; nothing runs until `start`.

        Args:
            model_dir: a local directory with ``config.json`` and safetensors.
            device: ``"cpu"``, ``"cuda"`` or ``"cuda:<n>"``.
            dtype: ``"f32"``, ``"bf16"`` or ``"f16"``; default that of the files.
            pages: slots in the pool.
            page_size_tokens: tokens a page, which is also the rows of every forward pass.
            threads: CPU threads for torch, **for the whole process**; default as they are. They decide bits.
            name: the layout's model name; default the directory's. Snapshots are refused under another name.
            max_model_len: tokens a sequence may have; default what the model and the pool allow.
            max_running: sequences that take turns; more wait.

        Raises:
            NotFound: there is no model there.
            UnsupportedModel: its cache cannot be paged, or it would need to run code or unpickle.
            InvalidInput: another argument is not allowed.
        """
        if not 1 <= page_size_tokens <= 4096:
            raise InvalidInput(f"page_size_tokens must be in [1, 4096], got {page_size_tokens}")
        if threads is not None:
            if threads < 1:
                raise InvalidInput(f"threads must be at least 1, got {threads}")
            torch.set_num_threads(threads)
        model = Model.load(model_dir, device=device, dtype=dtype, page_size_tokens=page_size_tokens, name=name)
        return cls(model, pages=pages, max_model_len=max_model_len, max_running=max_running)

    @property
    def layout(self) -> Layout:
        """Of every page."""
        return self.model.layout

    def numerics(self) -> dict[str, Any]:
        """What besides the layout decides the bits."""
        return self.model.numerics()

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

    # -- requests ------------------------------------------------------------------------------------------------

    def submit(
        self,
        token_ids: Ids[int],
        params: SamplingParams | None = None,
        *,
        sequence_id: str | None = None,
        resume: str | None = None,
        override: Mapping[str, Any] | None = None,
        on_step: Callable[[Event], None] | None = None,
    ) -> Request:
        """Queue a sequence.

        Args:
            token_ids: the prompt. With ``resume``: further ids to put after the resumed ones, often none.
            params: default `SamplingParams()`. With ``resume`` only ``max_tokens``, ``logprobs`` and ``logits``
                count; the rest comes from the resumed sequence, and its draws go on.
            sequence_id: the name to capture and resume it by; default a new one. The name of a finished sequence
                moves to the new one when that starts.
            resume: name of a sequence to go on from, exactly as if it had not stopped. It stays as it is, and can be
                continued many times: this makes forks.
            override: with ``resume``: other sampling parameters to change, by name. The draws go on, unless the seed
                is another one.
            on_step: called on the engine's thread with each `StepOutput`, and at the end with ``None`` or the
                exception; instead of iterating the request. Must be quick. If it raises, the request ends.

        Raises:
            InvalidInput: no prompt, an id out of the vocabulary, too long for the model or the pool, or a bad name.
            NotFound: there is no sequence to resume.
            Conflict: a sequence of that name is live.
            EngineError: the engine is closed.
        """
        params = params or SamplingParams()
        extra = self._check_ids(token_ids)
        if resume is None:
            seq = Sequence(id="", token_ids=extra, params=params, prompt_tokens=len(extra))
        else:
            with self.exclusive() as scheduler:
                source = scheduler.find(resume)
                if source is None:
                    raise NotFound(f"no sequence {resume!r} in the engine to resume: it was evicted, or never was")
                seq = continuation(source, params, override or {})
            seq.token_ids += extra
        if not seq.token_ids:
            raise InvalidInput("expected a prompt of at least one token, got none")
        self._check_length(len(seq.token_ids), seq.params.max_tokens)
        if seq.params.seed is None:
            seq.params = replace(seq.params, seed=secrets.randbits(63))
        seq.id = check_name(sequence_id) if sequence_id is not None else f"seq-{secrets.token_hex(8)}"
        seq.limit = min(len(seq.token_ids) + seq.params.max_tokens, self.max_model_len)
        seq.request = request = Request(seq.id, len(seq.token_ids), on_step)
        with self._wake:
            if self._closed:
                raise EngineError("the engine is closed")
            if seq.id in self.scheduler.live_names:
                raise Conflict(f"a sequence {seq.id!r} is live; wait for it, cancel it, or use another name")
            self.scheduler.live_names.add(seq.id)
            seq.arrival = next(self._arrivals)
            self._inbox.append(seq)
            self._wake.notify_all()
        return request

    def _check_ids(self, token_ids: Ids[int]) -> list[int]:
        ids = [int(token) for token in token_ids]
        wrong = next((token for token in ids if not 0 <= token < self.model.vocab), None)
        if wrong is not None:
            raise InvalidInput(f"token ids are in [0, {self.model.vocab}), got {wrong}")
        return ids

    def _check_length(self, tokens: int, more: int) -> None:
        needed = tokens + (more > 0)
        if needed > self._longest:
            raise InvalidInput(f"a sequence has at most {self._longest} tokens here, and the prompt has {tokens}")
        if needed > self.max_model_len:
            raise InvalidInput(
                f"the pool holds {self.max_model_len} tokens, and the prompt has {tokens}",
                hint="give the engine more pages (--pages)",
            )

    # -- sequences -----------------------------------------------------------------------------------------------

    def sequences(self) -> list[SequenceInfo]:
        """Every sequence that could be resumed or captured."""
        with self.exclusive() as scheduler:
            return [
                SequenceInfo(
                    id=seq.id,
                    status="resident" if seq.request is None else "running" if seq in scheduler.running else "waiting",
                    tokens=len(seq.token_ids),
                    computed=seq.computed,
                    prompt_tokens=seq.prompt_tokens,
                    pages=len(seq.table),
                )
                for seq in scheduler.sequences()
            ]

    def drop(self, sequence_id: str) -> None:
        """End a sequence, cancelling its request if it is live; full pages stay as prefix cache.

        Raises:
            NotFound: there is none of that name.
        """
        with self.exclusive() as scheduler:
            seq = scheduler.find(sequence_id)
            if seq is None:
                raise NotFound(f"no sequence {sequence_id!r} in the engine")
            scheduler.drop(seq, reason="cancelled")

    def clear_prefix_cache(self) -> int:
        """Free the pages kept only as prefix cache; how many there were."""
        with self.exclusive():
            return self.pool.clear_cached()

    def stats(self) -> dict[str, int]:
        """Counters and gauges, by name."""
        with self.exclusive() as scheduler:
            cached = len(self.pool.cached)
            return {
                "pages": len(self.pool),
                "pages_cached": cached,
                "pages_free": self.pool.available - cached,
                "pages_held": len(self.pool) - self.pool.available,
                "evictions": self.pool.evictions,
                "preemptions": scheduler.preemptions,
                "residents": len(scheduler.residents),
                "running": len(scheduler.running),
                "steps": scheduler.steps,
                "waiting": len(scheduler.waiting),
            }

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless references, free list, index and tables agree; for tests."""
        with self.exclusive() as scheduler, self._wake:
            self._empty_inbox()  # `submit` may have left another one meanwhile; now it cannot
            scheduler.check()
