"""The tiers of `kvist cartridge validate`: what a server's cartridges must stand, one question after the other.

Knows OpenAI's API over HTTP, `kv_transfer_params` in it, and the list of cartridges; must not know engines. What is
compared is what clients see: tokens and their log probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import httpx2

from kvist.errors import EngineError, InvalidInput

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
_TOKENS: Final = 16
_OK: Final = 200
_CLIENT_ERRORS: Final = range(400, 500)

Prompt = str | Sequence[int]


class Skip(Exception):
    """A tier that does not apply; the message says why."""


class Failure(Exception):
    """A tier that was not stood; the message says what came."""


@dataclass(frozen=True, slots=True)
class Question:
    """What to ask a cartridge, and what its answer must contain."""

    question: str
    answer: str
    cartridge: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """How one tier went.

    Attributes:
        tier: its number, as text.
        name: what it tries.
        outcome: ``passed``, ``failed`` or ``skipped``.
        detail: counts and measures; of a failure, what came.
    """

    tier: str
    name: str
    outcome: str
    detail: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion, as far as it is compared."""

    text: str
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    prompt_tokens: int
    cartridge: str | None

    def distance(self, other: Answer) -> float:
        """Difference of the first tokens' log probabilities; infinite if the tokens differ, or there is none."""
        if not self.tokens or self.tokens[:1] != other.tokens[:1]:
            return math.inf
        return abs(self.logprobs[0] - other.logprobs[0])


class Asker:
    """Asks one server.

    Attributes:
        http: the client, to be used from any thread.
        model: what the server calls its model.
    """

    def __init__(self, http: httpx2.Client, model: str | None = None) -> None:
        """Ask the server for its model unless ``model`` names one.

        Raises:
            EngineError: it does not answer.
        """
        self.http = http
        self.model: str = model or self.get("/v1/models")["data"][0]["id"]

    def get(self, path: str) -> dict[str, Any]:
        """A read that must succeed.

        Raises:
            EngineError: it does not.
        """
        try:
            answer = self.http.get(path)
        except httpx2.TransportError as error:
            raise EngineError(f"no server answers at {self.http.base_url}: {error}") from None
        if answer.status_code != 200:
            raise EngineError(f"GET {path}: status {answer.status_code}: {answer.text:.300}")
        document: dict[str, Any] = answer.json()
        return document

    def post(self, prompt: Prompt, cartridge: str | None, **fields: Any) -> httpx2.Response:
        """The raw answer to a completion."""
        body: dict[str, Any] = {"model": self.model, "prompt": prompt if isinstance(prompt, str) else list(prompt)}
        body |= {"max_tokens": _TOKENS, "temperature": 0.0, "logprobs": 1, **fields}
        if cartridge is not None:
            body["kv_transfer_params"] = {"cartridge_id": cartridge, **body.get("kv_transfer_params", {})}
        return self.http.post("/v1/completions", json=body)

    def complete(self, prompt: Prompt, cartridge: str | None, **fields: Any) -> Answer:
        """A completion that must succeed.

        Raises:
            Failure: it does not.
        """
        answer = self.post(prompt, cartridge, **fields)
        if answer.status_code != 200:
            raise Failure(f"cartridge {cartridge}: status {answer.status_code}: {answer.text:.300}")
        document = answer.json()
        (choice,) = document["choices"]
        logprobs = choice.get("logprobs") or {}
        used = ((document.get("kv_transfer_params") or {}).get("cartridge") or {}).get("id")
        return Answer(
            choice["text"],
            tuple(logprobs.get("tokens") or ()),
            tuple(logprobs.get("token_logprobs") or ()),
            document["usage"]["prompt_tokens"],
            used,
        )

    def chat(self, question: str, cartridge: str | None, max_tokens: int) -> str:
        """The reply to a question through the chat API.

        Raises:
            Failure: there is none.
        """
        body = {"model": self.model, "messages": [{"role": "user", "content": question}], "max_tokens": max_tokens}
        body |= {"temperature": 0.0}
        if cartridge is not None:
            body["kv_transfer_params"] = {"cartridge_id": cartridge}
        answer = self.http.post("/v1/chat/completions", json=body)
        if answer.status_code != 200:
            raise Failure(f"cartridge {cartridge}: status {answer.status_code}: {answer.text:.300}")
        return str(answer.json()["choices"][0]["message"]["content"] or "")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to try, and with what.

    Attributes:
        ids: of the cartridges.
        documents: text or token ids of those whose document is known.
        questions: to tier 1; none: the documents' own words are continued instead.
        tolerance: by which log probabilities may differ.
        concurrent, sequential: requests in tiers 2 and 4.
        uses_chat: whether questions go through the chat API.
        answer_tokens: length of the answer to a question.
        prompt: what is asked where any prompt will do.
    """

    ids: Sequence[str]
    documents: Mapping[str, Prompt] = field(default_factory=dict)
    questions: Sequence[Question] = ()
    tolerance: float = 0.2
    concurrent: int = 16
    sequential: int = 50
    uses_chat: bool = True
    answer_tokens: int = 64
    prompt: Prompt = "What is the answer?"


class Tiers:
    """Runs them in their order."""

    def __init__(self, ask: Asker, plan: Plan) -> None:
        """Take what is there.

        Raises:
            InvalidInput: no cartridge is to be tried.
        """
        if not plan.ids:
            raise InvalidInput("expected at least one cartridge to try, got none", hint="name one: --id ID")
        self._ask, self._plan = ask, plan
        self._isolated: dict[str | None, Answer] = {}

    def run(self) -> Iterator[Result]:
        """Each result as soon as it is there; a tier that fails does not keep later ones from being tried."""
        for number, name, tier in self._tiers():
            try:
                yield Result(number, name, PASSED, tier())
            except Skip as why:
                yield Result(number, name, SKIPPED, str(why))
            except Failure as what:
                yield Result(number, name, FAILED, str(what))
            except httpx2.TransportError as error:
                yield Result(number, name, FAILED, f"the server does not answer: {error}")

    @property
    def count(self) -> int:
        """Tiers that there are."""
        return len(self._tiers())

    def _tiers(self) -> list[tuple[str, str, Callable[[], str]]]:
        return [
            ("0", "answers with each cartridge", self._serves),
            ("0.5", "a cartridge is the prefill of its document", self._canary),
            ("1", "answers questions about the document", self._questions),
            ("1b", "log probabilities of what is generated", self._logprobs),
            ("2", "concurrent requests with one cartridge", self._concurrent),
            ("3", "each request gets its own cartridge", self._dispatch),
            ("4", "requests in a row", self._sequential),
            ("5", "what cannot be is refused, and the server lives", self._errors),
            ("6", "tensor parallel ranks", self._ranks),
        ]

    def _alone(self, cartridge: str | None) -> Answer:
        if cartridge not in self._isolated:
            self._isolated[cartridge] = self._ask.complete(self._plan.prompt, cartridge)
        return self._isolated[cartridge]

    def _serves(self) -> str:
        for cartridge in self._plan.ids:
            answer = self._alone(cartridge)
            if answer.cartridge not in (cartridge, None):
                raise Failure(f"asked for cartridge {cartridge!r}, the answer says {answer.cartridge!r}")
            plain = self._alone(None)
            if plain.cartridge is None and answer.prompt_tokens != plain.prompt_tokens:
                raise Failure(
                    f"usage: {answer.prompt_tokens} prompt tokens with cartridge {cartridge!r}, {plain.prompt_tokens} "
                    "without: its tokens are not the client's"
                )
            if plain.cartridge is None and answer.logprobs == plain.logprobs and answer.tokens == plain.tokens:
                raise Failure(f"cartridge {cartridge!r} changes nothing: the same log probabilities as without")
        return f"{len(self._plan.ids)} of {len(self._plan.ids)}"

    def _reference(self) -> Sequence[str]:
        """Cartridges that can be compared with their document in a plain prompt."""
        known = [cartridge for cartridge in self._plan.ids if cartridge in self._plan.documents]
        if not known:
            raise Skip("no document is known: --document ID=FILE or --cartridge ID=DIRECTORY")
        if self._alone(None).cartridge is not None:
            raise Skip("every request uses the server's default cartridge: there is nothing to compare with")
        return known

    def _canary(self) -> str:
        worst = 0.0
        known = self._reference()
        for cartridge in known:
            probe = self._probes(cartridge)[0]
            worst = max(worst, self._compare(cartridge, probe)[0])
        return f"{len(known)} cartridges, first tokens equal, log probabilities within {worst:.2g}"

    def _compare(self, cartridge: str, probe: Prompt) -> tuple[float, bool]:
        """The difference at the first token, and whether all tokens are equal."""
        whole = _join(self._plan.documents[cartridge], probe)
        plain = self._ask.complete(whole, None)
        placed = self._ask.complete(probe, cartridge, kv_transfer_params={"cartridge_prefix": "virtual"})
        distance = placed.distance(plain)
        if distance > self._plan.tolerance:
            raise Failure(
                f"cartridge {cartridge!r}: {placed.tokens[:1]} {placed.logprobs[:1]} with the cartridge, "
                f"{plain.tokens[:1]} {plain.logprobs[:1]} with its document in the prompt"
            )
        return distance, placed.tokens == plain.tokens

    def _probes(self, cartridge: str, count: int = 10) -> list[Prompt]:
        """Pieces from all over a document."""
        document = self._plan.documents[cartridge]
        size = min(24 if isinstance(document, str) else 8, len(document))
        return [document[at : at + size] for at in _spread(len(document) - size, count)]

    def _questions(self) -> str:
        if not self._plan.questions:
            known = self._reference()
            same = [self._compare(cartridge, probe)[1] for cartridge in known for probe in self._probes(cartridge)]
            return (
                f"{len(same)} of {len(same)} pieces of the document go on as after the document itself; "
                f"{sum(same)} of them for {_TOKENS} tokens"
            )
        wrong = [question for question in self._plan.questions if not self._is_right(question)]
        asked = len(self._plan.questions)
        if wrong:
            raise Failure(f"{asked - len(wrong)} of {asked} right; wrong: {wrong[0].question!r:.200}")
        return f"{asked} of {asked} right"

    def _is_right(self, question: Question) -> bool:
        cartridge = question.cartridge or self._plan.ids[0]
        if self._plan.uses_chat:
            reply = self._ask.chat(question.question, cartridge, self._plan.answer_tokens)
        else:
            reply = self._ask.complete(question.question, cartridge, max_tokens=self._plan.answer_tokens).text
        return question.answer.casefold() in reply.casefold()

    def _logprobs(self) -> str:
        for cartridge in self._plan.ids:
            answer = self._alone(cartridge)
            found = [value for value in answer.logprobs if math.isfinite(value) and value <= 0]
            if not found or len(found) != len(answer.tokens):
                raise Failure(f"cartridge {cartridge!r}: {len(answer.tokens)} tokens, {len(found)} log probabilities")
        return f"finite, one a token, with {len(self._plan.ids)} cartridges"

    def _concurrent(self) -> str:
        cartridge, count = self._plan.ids[0], self._plan.concurrent
        return self._all_alike([cartridge] * count, workers=count)

    def _dispatch(self) -> str:
        kinds: list[str | None] = list(self._plan.ids)
        if self._alone(None).cartridge is None:
            kinds.append(None)
        if len(kinds) < 2:
            raise Skip("one cartridge, and every request uses it")
        answers = {kind: self._alone(kind) for kind in kinds}
        for at, one in enumerate(kinds):
            for other in kinds[at + 1 :]:
                if answers[one].logprobs == answers[other].logprobs and answers[one].tokens == answers[other].tokens:
                    raise Failure(f"{_name(one)} and {_name(other)} answer alike, to the last bit")
        return self._all_alike(kinds * math.ceil(self._plan.concurrent / len(kinds)), workers=self._plan.concurrent)

    def _sequential(self) -> str:
        return self._all_alike([self._plan.ids[0]] * self._plan.sequential, workers=1)

    def _all_alike(self, kinds: Sequence[str | None], *, workers: int) -> str:
        """Ask as often, and compare each answer with that of a request that was alone."""
        alone = {kind: self._alone(kind) for kind in set(kinds)}
        with ThreadPoolExecutor(workers) as pool:
            answers = list(pool.map(lambda kind: self._ask.complete(self._plan.prompt, kind), kinds))
        worst, equal = 0.0, 0
        for kind, answer in zip(kinds, answers, strict=True):
            distance = answer.distance(alone[kind])
            if distance > self._plan.tolerance:
                raise Failure(
                    f"{_name(kind)}: {answer.tokens[:1]} {answer.logprobs[:1]} among others, "
                    f"{alone[kind].tokens[:1]} {alone[kind].logprobs[:1]} alone"
                )
            worst, equal = max(worst, distance), equal + (answer.tokens == alone[kind].tokens)
        return f"{len(answers)} of {len(answers)} as alone, within {worst:.2g}; {equal} of them in all tokens"

    def _errors(self) -> str:
        cartridge = self._plan.ids[0]
        nobody = "kvist-validate-no-such-cartridge"
        refused = {
            "an empty prompt": self._ask.post([], cartridge),
            "an unknown id": self._ask.post(self._plan.prompt, nobody),
            "an unknown id, streamed": self._ask.post(self._plan.prompt, nobody, stream=True),
            "a cartridge_id that is no text": self._ask.post(
                self._plan.prompt, None, kv_transfer_params={"cartridge_id": {}}
            ),
        }
        # by its router, or its configuration, a server may not look at ids, or answer unknown ones without a cartridge
        is_lenient = refused["an unknown id"].status_code == _OK
        lenient = {
            what for what, answer in refused.items() if is_lenient and "id" in what and answer.status_code == _OK
        }
        for what, answer in refused.items():
            if answer.status_code not in _CLIENT_ERRORS and what not in lenient:
                raise Failure(f"{what}: expected a status of 4xx, got {answer.status_code}: {answer.text:.200}")
        short = self._ask.complete([1], cartridge)
        after = self._ask.complete(self._plan.prompt, cartridge)
        if not short.tokens or after.distance(self._alone(cartridge)) > self._plan.tolerance:
            raise Failure("after errors the answer is another one")
        said = "; unknown ids are answered: this server is not one that refuses them" if lenient else ""
        count = len(refused) - len(lenient)
        return f"{count} refused with 4xx; a prompt of one token answered; the same answer after all that{said}"

    def _ranks(self) -> str:
        answer = self._ask.http.get("/v1/kvist/stats")
        ranks = len(answer.json().get("ranks", ())) if answer.status_code == 200 else 1
        if ranks < 2:
            raise Skip("one rank")
        return f"{ranks} ranks: {self._canary()}"


def _name(kind: str | None) -> str:
    return "no cartridge" if kind is None else f"cartridge {kind!r}"


def _join(document: Prompt, probe: Prompt) -> Prompt:
    if isinstance(document, str) and isinstance(probe, str):
        return document + probe
    if isinstance(document, str) or isinstance(probe, str):
        raise TypeError("a document and a probe of two kinds")
    return [*document, *probe]


def _spread(last: int, count: int) -> list[int]:
    return [round(at * last / max(1, count - 1)) for at in range(count)]
