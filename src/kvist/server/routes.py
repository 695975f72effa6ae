"""The table of every route of every HTTP surface: how far a token must reach for it, and what it takes.

Knows paths, scopes and bodies; must not know who answers. A route that is not here is answered to nobody
(`kvist.server.access`), and a test compares the table with the applications. ``GET /openapi.json`` is made of it.

*read* looks; *write* computes, and changes what the caller's repository and its sequences are; *admin* changes what
the server offers to all, or names files of its machine. What is of the whole server is not for tenants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from msgspec import Struct
from starlette.routing import compile_path

from kvist.server.schema import CartridgeBody, ChatBody, CheckoutBody, CompletionBody, ForkBody, SnapshotBody
from kvist.server.tokens import Scope


@dataclass(frozen=True, slots=True)
class Rule:
    """What the table says of a route.

    Attributes:
        scope: how far a token must reach.
        about: one line.
        body: what it takes as JSON.
        query: its query parameters, with their meaning.
        for_tenants: whether tenants may use it.
        in_api: whether ``/openapi.json`` tells of it.
    """

    scope: Scope
    about: str
    body: type[Struct] | None = None
    query: Sequence[tuple[str, str]] = ()
    for_tenants: bool = True
    in_api: bool = True


_OPEN, _READ, _WRITE, _ADMIN = Scope.OPEN, Scope.READ, Scope.WRITE, Scope.ADMIN

ROUTES: Final[Mapping[tuple[str, str], Rule]] = {
    ("GET", "/health"): Rule(_OPEN, "Whether the server accepts connections."),
    ("GET", "/version"): Rule(_READ, "The version."),
    ("GET", "/openapi.json"): Rule(_READ, "This document."),
    ("GET", "/v1/models"): Rule(_READ, "The models."),
    ("GET", "/v1/models/{model:path}"): Rule(_READ, "One model."),
    ("POST", "/v1/completions"): Rule(_WRITE, "Complete a prompt.", CompletionBody),
    ("POST", "/v1/chat/completions"): Rule(_WRITE, "Answer a chat.", ChatBody),
    ("POST", "/v1/processfork/snapshot"): Rule(_WRITE, "Capture the engine, a request or a sequence.", SnapshotBody),
    ("POST", "/v1/processfork/fork"): Rule(_WRITE, "Make branches that continue a snapshot.", ForkBody),
    ("POST", "/v1/processfork/checkout"): Rule(_WRITE, "Put a snapshot into the engine.", CheckoutBody),
    ("GET", "/v1/processfork/snapshots"): Rule(
        _READ, "The snapshots, newest first.", query=(("rev", "only its ancestors"), ("limit", "at most so many"))
    ),
    ("GET", "/v1/processfork/snapshots/{rev:path}"): Rule(_READ, "One snapshot."),
    ("GET", "/v1/processfork/lineage"): Rule(_READ, "The graph of snapshots."),
    ("GET", "/v1/processfork/sequences"): Rule(_READ, "What the engine holds."),
    ("DELETE", "/v1/processfork/sequences/{id:path}"): Rule(_WRITE, "Drop a sequence."),
    ("GET", "/v1/processfork/layout"): Rule(_READ, "What pages must be to fit the engine."),
    ("GET", "/v1/processfork/stats"): Rule(_READ, "What has gone between the engine and the store.", for_tenants=False),
    ("GET", "/v1/kvist/cartridges"): Rule(_READ, "The cartridges that requests may use."),
    ("POST", "/v1/kvist/cartridges"): Rule(_ADMIN, "Register a cartridge.", CartridgeBody, for_tenants=False),
    ("GET", "/v1/kvist/cartridges/{cartridge_id:path}"): Rule(_READ, "One cartridge."),
    ("DELETE", "/v1/kvist/cartridges/{cartridge_id:path}"): Rule(_ADMIN, "Unregister one.", for_tenants=False),
    ("GET", "/v1/kvist/stats"): Rule(_READ, "What was done with cartridges.", for_tenants=False),
    ("GET", "/metrics"): Rule(_READ, "Metrics, for Prometheus.", for_tenants=False, in_api=False),
    # the page
    ("GET", "/"): Rule(_READ, "The page.", in_api=False),
    ("GET", "/ui/lineage"): Rule(_READ, "The page's graph.", in_api=False),
    ("GET", "/ui/snapshots/{rev:path}"): Rule(_READ, "The page of one snapshot.", in_api=False),
    ("POST", "/ui/fork"): Rule(_WRITE, "The page's form to fork.", in_api=False),
    ("POST", "/ui/tag"): Rule(_WRITE, "The page's form to tag.", in_api=False),
    ("POST", "/ui/checkout"): Rule(_WRITE, "The page's form to check out.", in_api=False),
    ("GET", "/ui/login"): Rule(_OPEN, "Where a browser gives its token.", in_api=False),
    ("POST", "/ui/login"): Rule(_OPEN, "The same.", in_api=False),
    ("POST", "/ui/logout"): Rule(_OPEN, "Where it forgets it.", in_api=False),
    ("POST", "/ui/theme"): Rule(_OPEN, "Light or dark.", in_api=False),
    ("GET", "/ui/static/{name}"): Rule(_OPEN, "The page's own files.", in_api=False),
    ("GET", "/favicon.svg"): Rule(_OPEN, "The icon.", in_api=False),
    ("GET", "/favicon.ico"): Rule(_OPEN, "The same.", in_api=False),
    # the mock engines, and vLLM
    ("GET", "/ping"): Rule(_OPEN, "As /health.", in_api=False),
    ("POST", "/tokenize"): Rule(_READ, "The ids of a prompt.", in_api=False),
    ("POST", "/detokenize"): Rule(_READ, "The text of ids.", in_api=False),
    ("POST", "/mock/held"): Rule(_READ, "How much of a prompt is cached.", for_tenants=False, in_api=False),
}
"""By method and path, as Starlette writes it; of several that match, the first counts. ``HEAD`` counts as ``GET``."""


_COMPILED: Final = [(method, compile_path(path)[0], rule) for (method, path), rule in ROUTES.items()]
REFUSED: Final = Rule(_READ, "A method that the path does not take.")
"""Of requests whose path is known and whose method is not: let through, to be told so."""
_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})


def find_rule(method: str, path: str) -> Rule | None:
    """The rule of a request; where the path takes other methods only, `REFUSED`; else none."""
    wanted = "GET" if method == "HEAD" else method
    is_known = False
    for of, pattern, rule in _COMPILED:
        if pattern.match(path):
            if of == wanted:
                return rule
            is_known = True
    return REFUSED if is_known else None


def is_mutating(method: str) -> bool:
    """Whether a request of that method may change anything."""
    return method not in _SAFE
