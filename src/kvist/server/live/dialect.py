"""How an engine's API server speaks: its routes and bodies, and which of them tenants may use. Knows no engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from kvist.repo import LogicalSeq
from kvist.server.routes import REFUSED, Rule, find_rule
from kvist.server.tokens import Scope

_OURS: Final = ("/v1/processfork/", "/v1/kvist/")
_TENANT_OF_OURS: Final = ("/v1/processfork/snapshots", "/v1/processfork/lineage", "/v1/processfork/fork")

Fill = Callable[[dict[str, Any], LogicalSeq, str], list[int] | None]
"""Puts the prompt that a sequence of a snapshot (its cid) is into a body which names it, or checks the one there.

Returns the ids of the one prompt; ``None``: there are several. Raises `BadRequest`: it does not begin as the sequence.
"""


TenantBody = Callable[[Mapping[str, Any], str], dict[str, Any]]
"""A tenant's body as it may reach the engine, under the tenant's salt. Raises `Forbidden`: it says what none may."""


@dataclass(frozen=True, slots=True)
class Generating:
    """A route that generates.

    Attributes:
        id_prefix: what the engine puts before a request's name to make its id.
        fill: see `Fill`.
        tenant_body: see `TenantBody`; ``None``: the route is not for tenants.
    """

    id_prefix: str
    fill: Fill
    tenant_body: TenantBody | None = None


@dataclass(frozen=True, slots=True)
class Dialect:
    """One engine's API.

    Attributes:
        engine: what people call it.
        generating: its routes that generate and may name a snapshot, in JSON bodies; by path.
        for_tenants: paths of its other routes that a tenant may use.
        computing: paths of further routes that compute; a token that may write may use them.
        tokens_option: how its configuration names a tokens file.
    """

    engine: str
    generating: Mapping[str, Generating]
    for_tenants: frozenset[str]
    computing: frozenset[str]
    tokens_option: str

    def rule_of(self, method: str, path: str) -> Rule:
        """The rule of a route of ours or of the engine's; what neither is known to have takes an admin."""
        found, ours = find_rule(method, path), is_ours(path)
        if found is None or (found is REFUSED and not ours):  # the engine may take a method that we do not know
            computes = method == "POST" and path in self.computing
            about = f"A route of {self.engine}'s."
            return Rule(Scope.WRITE if computes else Scope.ADMIN, about, for_tenants=False)
        route = self.generating.get(path)
        is_known = path in self.for_tenants or (route is not None and route.tenant_body is not None)
        is_theirs = is_known or (ours and _is_of_a_tenant(path)) or found.scope is Scope.OPEN
        return Rule(found.scope, found.about, for_tenants=found.for_tenants and is_theirs)


def is_ours(path: str) -> bool:
    """Whether a route is kvist's."""
    return path.startswith(_OURS)


def _is_of_a_tenant(path: str) -> bool:
    return path.startswith("/v1/kvist/") or any(path == one or path.startswith(f"{one}/") for one in _TENANT_OF_OURS)
