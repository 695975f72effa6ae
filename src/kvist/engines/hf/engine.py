"""The engine: a model, its pool, and what may be asked of them.

Knows requests and limits. Must not know how tiles, tables or turns work: `kvist.engines.hf.scheduler` does; nor when
the engine may be touched: `kvist.engines.hf.thread` does.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Ids
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch

from kvist.cartridge.cartridge import Cartridge
from kvist.cartridge.placing import Prefix
from kvist.engines.hf.cartridges import HOST_BYTES, Cartridges, Hold
from kvist.engines.hf.model import Model
from kvist.engines.hf.pool import PagePool
from kvist.engines.hf.sampling import SamplingParams
from kvist.engines.hf.scheduler import Scheduler
from kvist.engines.hf.sequence import Event, Request, Sequence, SequenceInfo, continuation
from kvist.engines.hf.thread import EngineThread
from kvist.errors import DamagedCartridge, InvalidInput, NotFound
from kvist.ids import check_name
from kvist.layout import Layout


class Engine(EngineThread):
    """A causal LM with a paged, shared KV pool. Use as a context manager, or `start` and `close` it.

    Attributes:
        model: the loaded model.
        pool: its slots; touch it in `exclusive` only.
        scheduler: tables and turns; touch it in `exclusive` only.
        cartridges: what requests may begin with, by name.
        max_model_len: tokens a sequence may have: a cartridge's, the prompt's and the output's together.
    """

    def __init__(
        self,
        model: Model,
        *,
        pages: int = 1024,
        max_model_len: int | None = None,
        max_running: int = 64,
        cartridge_bytes: int = HOST_BYTES,
    ) -> None:
        for name, value in (
            ("pages", pages),
            ("max_model_len", 1 if max_model_len is None else max_model_len),
            ("max_running", max_running),
            ("cartridge_bytes", cartridge_bytes),
        ):
            if value < 1:
                raise InvalidInput(f"{name} must be at least 1, got {value}")
        self.model = model
        self.pool = PagePool(model.layout, pages, model.device)
        super().__init__(Scheduler(model, self.pool, max_running=max_running))
        self.cartridges = Cartridges(model.layout, lambda: model.identity, model.vocab, host_bytes=cartridge_bytes)
        longest = min((n for n in (model.max_positions, max_model_len) if n is not None), default=2**31)
        self._longest = longest
        self.max_model_len = min(longest, pages * model.layout.page_size_tokens)

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
        cartridge_bytes: int = HOST_BYTES,
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
            cartridge_bytes: host memory for cartridges; beside it is that of restored sequences' own, while they are
                live (`Cartridges.carry`).

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
        return cls(
            model, pages=pages, max_model_len=max_model_len, max_running=max_running, cartridge_bytes=cartridge_bytes
        )

    @property
    def layout(self) -> Layout:
        """Of every page."""
        return self.model.layout

    def numerics(self) -> dict[str, Any]:
        """What besides the layout decides the bits."""
        return self.model.numerics()

    def close(self) -> None:
        """See `EngineThread.close`; what is in host memory goes too."""
        super().close()
        self.cartridges.close()

    # -- cartridges ----------------------------------------------------------------------------------------------

    def load_cartridge(self, cartridge: Cartridge, *, id: str | None = None) -> str:
        """Let requests begin with ``cartridge``; returns its name. See `Cartridges.add` for what is refused."""
        return self.cartridges.add(cartridge, id)

    def unload_cartridge(self, cartridge_id: str) -> bool:
        """Let no new request begin with it; whether it was loaded. Sequences that did go on."""
        return self.cartridges.remove(cartridge_id)

    # -- requests ------------------------------------------------------------------------------------------------

    def submit(
        self,
        token_ids: Ids[int],
        params: SamplingParams | None = None,
        *,
        sequence_id: str | None = None,
        resume: str | None = None,
        override: Mapping[str, Any] | None = None,
        cartridge: str | Prefix | None = None,
        on_step: Callable[[Event], None] | None = None,
        salt: str = "",
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
            cartridge: what to begin with, by its name, or as `Cartridges.prefix` says for this prompt: placed before
                the prompt, unless that repeats its document. With ``resume``: not allowed, the sequence keeps its own.
                If it is not in host memory, it is brought there first.
            on_step: called on the engine's thread with each `StepOutput`, and at the end with ``None`` or the
                exception; instead of iterating the request. Must be quick. If it raises, the request ends.
            salt: of whose it is: sequences of other salts share no page with it. With ``resume``: that of the resumed.

        Raises:
            InvalidInput: no prompt, an id out of the vocabulary, too long for the model or the pool, or a bad name.
            NotFound: there is no sequence to resume.
            UnknownCartridge: there is no cartridge of that name; or the resumed sequence lacks pages of one that is
                not known here.
            LayoutMismatch, DamagedCartridge, InvalidCartridge, ResidencyFull: the cartridge cannot be used, now or
                ever.
            Conflict: a sequence of that name is live.
            EngineError: the engine is closed.
        """
        params = params or SamplingParams()
        extra = self._check_ids(token_ids)
        if resume is None:
            seq = self._begin(extra, params, cartridge)
            seq.owner_salt = salt
        elif cartridge is not None:
            raise InvalidInput("a sequence that is resumed keeps the cartridge that it has; leave the cartridge out")
        else:
            seq = self._continue(resume, params, override or {}, salt)
        try:
            seq.token_ids += extra
            return self._queue(seq, sequence_id, on_step)
        except BaseException:
            seq.let_go()
            raise

    def _begin(self, prompt: list[int], params: SamplingParams, cartridge: str | Prefix | None) -> Sequence:
        """A sequence to which ``prompt`` is still to be added."""
        if not prompt:
            raise InvalidInput("expected a prompt of at least one token, got none")
        if cartridge is None:
            return Sequence(id="", token_ids=[], params=params, prompt_tokens=len(prompt))
        prefix = cartridge if isinstance(cartridge, Prefix) else self.cartridges.prefix(cartridge, prompt)
        self._check_length(prefix.own, len(prompt), params)  # or it is not worth a load
        hold = self.cartridges.hold(prefix)
        ids = self.cartridges.ids_of(prefix, hold)
        return Sequence(
            id="", token_ids=ids, params=params, prompt_tokens=len(ids) + len(prompt), prefix=prefix, hold=hold
        )

    def _continue(self, resume: str, params: SamplingParams, override: Mapping[str, Any], salt: str) -> Sequence:
        with self.exclusive() as scheduler:
            source = scheduler.find(resume)
            if source is None or source.owner_salt != salt:
                raise NotFound(f"no sequence {resume!r} in the engine to resume: it was evicted, or never was")
            seq = continuation(source, params, override)
            if source.prefix is not None:
                seq.hold = self.cartridges.held(source.prefix) or self._hold_of(source, source.prefix)
        if seq.prefix is not None and seq.hold is None:
            # Not in the pause: it comes from files.
            seq.hold = self.cartridges.hold(seq.prefix)
        if seq.prefix is not None and seq.hold is not None:
            pages, expected = len(seq.hold.pages), -(-seq.prefix.tokens // self.layout.page_size_tokens)
            if pages != expected:
                seq.let_go()
                raise DamagedCartridge(
                    f"sequence {resume!r} says that cartridge {seq.prefix.cartridge_id!r:.120} has {seq.prefix.tokens} "
                    f"tokens, which are {expected} pages, and it has {pages}"
                )
        return seq

    def _hold_of(self, source: Sequence, prefix: Prefix) -> Hold | None:
        """A cartridge's pages as a sequence has them, which may have come with a snapshot; or it lacks some."""
        if source.computed < prefix.tokens:
            return None
        slots = source.table[: -(-prefix.tokens // self.layout.page_size_tokens)]
        return self.cartridges.carry(prefix, self.pool.data[slots].cpu())

    def _queue(self, seq: Sequence, sequence_id: str | None, on_step: Callable[[Event], None] | None) -> Request:
        self._check_length(seq.own, len(seq.token_ids) - seq.own, seq.params)
        if seq.params.seed is None:
            seq.params = replace(seq.params, seed=secrets.randbits(63))
        seq.id = check_name(sequence_id) if sequence_id is not None else f"seq-{secrets.token_hex(8)}"
        seq.limit = min(len(seq.token_ids) + seq.params.max_tokens, self.max_model_len)
        seq.request = request = Request(seq.id, len(seq.token_ids) - seq.own, on_step, seq.prefix)
        self.enqueue(seq)
        return request

    def _check_ids(self, token_ids: Ids[int]) -> list[int]:
        ids = [int(token) for token in token_ids]
        wrong = next((token for token in ids if not 0 <= token < self.model.vocab), None)
        if wrong is not None:
            raise InvalidInput(f"token ids are in [0, {self.model.vocab}), got {wrong}")
        return ids

    def _check_length(self, own: int, prompt: int, params: SamplingParams) -> None:
        """Whether there is room for ``own`` tokens of a cartridge and a prompt after it."""
        needed = own + prompt + (params.max_tokens > 0)
        told = f"the cartridge has {own} and the prompt has {prompt}" if own else f"the prompt has {prompt}"
        if needed > self._longest:
            raise InvalidInput(f"a sequence has at most {self._longest} tokens here, and {told}")
        if needed > self.max_model_len:
            raise InvalidInput(
                f"the pool holds {self.max_model_len} tokens, and {told}", hint="give the engine more pages (--pages)"
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
                    cartridge=seq.prefix.cartridge_id if seq.prefix is not None else None,
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
                "pages_pinned": len(+self.pool.pinned),
                "evictions": self.pool.evictions,
                "preemptions": scheduler.preemptions,
                "residents": len(scheduler.residents),
                "running": len(scheduler.running),
                "steps": scheduler.steps,
                "waiting": len(scheduler.waiting),
            }
