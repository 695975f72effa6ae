"""From a request body to where each choice starts: prompts to ids, snapshots to sequences, fields to parameters.

Knows bodies, the tokenizer, sessions and the engine's parameters. Must not know HTTP or answers. May take long
(tokenizing, a checkout), so it is called in a worker thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from kvist.cartridge.placing import Prefix, skips
from kvist.errors import NotFound
from kvist.server.errors import BadRequest
from kvist.server.generation import SEEDS, Start, derived_seed, fresh_seed
from kvist.server.history import unless_lost
from kvist.server.offer import Offer
from kvist.server.prompts import is_text, prompt_field, prompts_of
from kvist.server.recent import Prompt, Recent
from kvist.server.schema import ChatBody, CompletionBody, GenerationBody, Transfer
from kvist.server.sessions import Session, Sessions
from kvist.server.tokenizer import Tokenizer

if TYPE_CHECKING:
    from kvist.engines.hf import AnyEngine, SamplingParams

_CHOICES_MAX: Final = 1024
_LOGITS_MAX: Final = 256 * 1024 * 1024
"""Bytes of logits in an answer that is not streamed: all of its choices together."""
_COMPLETION_TOKENS: Final = 16
"""OpenAI's default for completions; a chat goes on as long as there is room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One engine and one repository, and how to reach them.

    Attributes:
        name: what clients call the model.
        engine: runs already.
        sessions: relates it to the repository.
        recent: remembers the last requests.
        params: the engine's class of sampling parameters.
        offer: the cartridges that requests may use.
        tokenizer: ``None``: only token ids can be sent.
        body_max: largest body, in bytes.
    """

    name: str
    engine: AnyEngine
    sessions: Sessions
    recent: Recent
    offer: Offer
    params: Callable[..., SamplingParams]
    tokenizer: Tokenizer | None
    body_max: int

    def skips(self, body: CompletionBody | ChatBody, ids: Sequence[int], cartridge: Prefix | None) -> int:
        """How many first ids of a prompt are left out: see `kvist.cartridge.placing.skips`."""
        if cartridge is None or not cartridge.placed or self.tokenizer is None or not is_text(body):
            return 0
        return skips(ids, self.tokenizer.special_id("bos_token"))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, without special tokens; none without a tokenizer."""
        return self.tokenizer.decode(ids) if self.tokenizer is not None else ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to submit.

    Attributes:
        starts: by choice; the choices of one prompt lie together.
        prompts: as the server remembers them.
        session: the snapshot's sequence that they continue, if they do.
        cartridge: what they begin with; of several prompts the first one, and where it stands there.
    """

    starts: list[Start]
    prompts: list[Prompt]
    session: Session | None
    cartridge: Prefix | None = None


def make_plan(served: Served, body: CompletionBody | ChatBody) -> Plan:
    """Decide where each choice starts, checking a snapshot out if need be.

    Raises:
        BadRequest: naming the field.
        KvistError: as `Sessions.session`.
    """
    if body.model is not None and body.model != served.name:
        raise NotFound(f"this server has no model {body.model!r:.200}, it has {served.name!r}")
    session = _session(served, body.kv_transfer_params)
    prompts = prompts_of(served.tokenizer, body)
    if session is None and not all(prompts):
        raise BadRequest(f"{prompt_field(body)}: expected at least one token, got none", param=prompt_field(body))
    n = body.n or 1
    if n * len(prompts) > _CHOICES_MAX:
        raise BadRequest(f"n: expected at most {_CHOICES_MAX} choices in all, got {n * len(prompts)}", param="n")
    if session is not None:
        cartridges = [Prefix.of_state(session.sequence.state)] * len(prompts)
    else:
        cartridges = [served.offer.prefix(body.kv_transfer_params, ids) for ids in prompts]
    starts = [
        _start(served, body, ids, session, cartridge, number)
        for ids, cartridge in zip(prompts, cartridges, strict=True)
        for number in range(n)
    ]
    if body.wants_logits and not body.stream:
        _check_logits(sum(start.params.max_tokens for start in starts), served.engine.model.vocab)
    return Plan(starts, [served.recent.prompt(start.token_ids) for start in starts[::n]], session, cartridges[0])


def _session(served: Served, transfer: Transfer | None) -> Session | None:
    """The snapshot's sequence that a body names."""
    if transfer is None:
        return None
    if transfer.snapshot is None:
        if transfer.sequence is not None:
            param = "kv_transfer_params.snapshot"
            raise BadRequest(
                f"{param}: expected the snapshot that sequence {transfer.sequence!r:.200} is of", param=param
            )
        return None
    for name in (*transfer.chosen(), *(["cartridge_prefix"] if transfer.cartridge_prefix is not None else [])):
        param = f"kv_transfer_params.{name}"[:200]
        raise BadRequest(f"{param}: a snapshot's sequence keeps the cartridge that it has", param=param)
    rev, sequence_id = transfer.snapshot, transfer.sequence
    return unless_lost(served.sessions.repo.store, lambda: served.sessions.session(rev, sequence_id))


def _start(
    served: Served,
    body: CompletionBody | ChatBody,
    ids: list[int],
    session: Session | None,
    cartridge: Prefix | None,
    number: int,
) -> Start:
    placed = cartridge.own if cartridge is not None else 0
    skipped = served.skips(body, ids, cartridge)
    if session is None:
        params = _params(served, body, len(ids) - skipped, placed, temperature=1.0)
        seed = fresh_seed() if body.seed is None else (body.seed + number) % SEEDS
        return Start(ids, replace(params, seed=seed), cartridge=cartridge, skipped=skipped)
    known = session.sequence.token_ids[placed:]
    if ids[:skipped] != list(known[:skipped]):
        ids = ids[skipped:]
    whole = _continued(known, ids, session, prompt_field(body))
    carried = _sampling(session)
    wanted = _given(body)
    if body.seed is not None:
        wanted["seed"] = (body.seed + number) % SEEDS
    elif number:  # the first choice goes on with the sequence's draws; the others branch off
        wanted["seed"] = derived_seed(carried.get("seed") or 0, len(whole), number)
    override = {name: value for name, value in wanted.items() if name not in carried or carried[name] != value}
    params = _params(served, body, len(whole), placed)
    return Start(whole, params, session.engine_id, len(whole) - len(known), override)


def _sampling(session: Session) -> dict[str, Any]:
    """The parameters that a sequence carries, in the form of `_given`."""
    sampling = session.sequence.state.get("sampling")
    if not isinstance(sampling, dict):
        return {}
    stops = sampling.get("stop_token_ids")
    return sampling | ({"stop_token_ids": tuple(stops)} if isinstance(stops, list | tuple) else {})


def _continued(known: Sequence[int], ids: list[int], session: Session, param: str) -> list[int]:
    if ids[: len(known)] == list(known) or not ids:
        return ids or list(known)
    same = next((n for n, (a, b) in enumerate(zip(known, ids, strict=False)) if a != b), min(len(known), len(ids)))
    raise BadRequest(
        f"{param}: must be left out, or start with the {len(known)} token ids of sequence {session.sequence.id!r} of "
        f"{session.cid}; it has {len(ids)} ids, and {same} of them agree",
        param=param,
    )


def _given(body: GenerationBody) -> dict[str, Any]:
    """Sampling parameters that the body sets, but for the seed."""
    given: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": None if body.top_k is None else max(body.top_k, 0),
        "stop_token_ids": None if body.stop_token_ids is None else tuple(body.stop_token_ids),
        "ignore_eos": body.ignore_eos,
    }
    return {name: value for name, value in given.items() if value is not None}


def _check_logits(rows: int, vocab: int) -> None:
    if 4 * vocab * rows > _LOGITS_MAX:
        raise BadRequest(
            f"kvist.logits: {rows} rows of {vocab} are over {_LOGITS_MAX} bytes; stream them, or ask for fewer tokens",
            param="kvist.logits",
        )


def _params(served: Served, body: GenerationBody, tokens: int, placed: int, **defaults: Any) -> SamplingParams:
    room = max(served.engine.max_model_len - placed - tokens, 1)
    wanted, param = body.max_tokens, "max_tokens"
    logprobs: int | None = None
    if isinstance(body, ChatBody):
        if body.max_completion_tokens is not None:
            wanted, param = body.max_completion_tokens, "max_completion_tokens"
        if body.top_logprobs is not None and not body.logprobs:
            raise BadRequest("top_logprobs: needs logprobs: true", param="top_logprobs")
        logprobs = body.top_logprobs or 0 if body.logprobs else None
        default = room
    elif isinstance(body, CompletionBody):
        if body.echo and body.logprobs is not None:
            raise BadRequest("logprobs: with echo, the prompt's are not supported; leave one out", param="logprobs")
        logprobs = body.logprobs
        default = min(_COMPLETION_TOKENS, room)
    if wanted is not None and wanted > room and placed + tokens < served.engine.max_model_len:
        before = f"the cartridge has {placed} tokens, " if placed else ""
        raise BadRequest(
            f"{param}: {before}the prompt has {tokens} tokens and a sequence at most {served.engine.max_model_len}, so "
            f"expected at most {room}, got {wanted}",
            param=param,
        )
    count = default if wanted is None else wanted
    settings = defaults | _given(body)
    return served.params(max_tokens=count, logprobs=logprobs, logits=body.wants_logits, **settings)
