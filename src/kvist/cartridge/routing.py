"""Routers: from what a request says to the id of the cartridge that it uses. Pure but for the registry of a label.

A router decides on an id and does not ask whether there is such a cartridge: the library does, and says so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from kvist.errors import InvalidInput, UnknownCartridge

ID_KEY: Final = "cartridge_id"
"""Where a request names a cartridge, unless the configuration says another key."""
LABEL_KEY: Final = "cartridge_label"
"""Where a request names a label's value, unless the configuration says another key."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What a request says besides its prompt.

    Attributes:
        kv_transfer_params: the field of that name in the body of the request.
        extra_args: of vLLM's sampling parameters (``vllm_xargs`` in a body).
    """

    kv_transfer_params: Mapping[str, Any] | None = None
    extra_args: Mapping[str, Any] | None = None

    def value(self, key: str) -> str | None:
        """What the request says under ``key``; ``None`` if nothing, or null.

        Looked for in `kv_transfer_params`, then `extra_args`, then ``kv_transfer_params`` within `extra_args`, which is
        where offline callers have to put it. A number is taken for its digits.

        Raises:
            InvalidInput: it is neither text nor a whole number.
        """
        extra = self.extra_args or {}
        nested = extra.get("kv_transfer_params")
        for place in (self.kv_transfer_params, extra, nested):
            found = place.get(key) if isinstance(place, Mapping) else None
            if found is not None:
                return _text(key, found)
        return None


def _text(key: str, found: object) -> str:
    if isinstance(found, bool) or not isinstance(found, str | int):
        raise InvalidInput(f"expected {key} to be text or a whole number, got {found!r:.120}")
    return str(found)


class Labelled(Protocol):
    """The part of a registry that routers need."""

    def ids_by_label(self, key: str, value: str) -> list[str]:
        """Ids of the cartridges that carry the label, in the order of their registration."""


class CartridgeRouter(ABC):
    """The rule by which a request chooses a cartridge."""

    @property
    def keys(self) -> frozenset[str]:
        """Under which a request may say something to it."""
        return frozenset()

    @abstractmethod
    def resolve(self, selection: Selection) -> str | None:
        """The id of the cartridge that the request uses; ``None`` if it uses none.

        Raises:
            InvalidInput: what the request says has the wrong type.
            UnknownCartridge: the request asks for something that no id stands for.
        """

    def choose(self, selection: Selection) -> str | None:
        """As `resolve`, for a client: who names one cartridge never gets another, or none, unsaid.

        Raises:
            InvalidInput: it names one under `ID_KEY`, which this router does not go by, and which is not its choice.
        """
        chosen = self.resolve(selection)
        named = None if ID_KEY in self.keys else selection.value(ID_KEY)
        if named is not None and named != chosen:
            raise InvalidInput(f"{ID_KEY}: here a request does not name it; expected {chosen!r}, got {named!r:.120}")
        return chosen


@dataclass(frozen=True, slots=True)
class ExplicitCartridgeRouter(CartridgeRouter):
    """The request names the id under ``key``."""

    key: str = ID_KEY

    @property
    def keys(self) -> frozenset[str]:
        """See `CartridgeRouter`."""
        return frozenset({self.key})

    def resolve(self, selection: Selection) -> str | None:
        """See `CartridgeRouter`."""
        return selection.value(self.key)


@dataclass(frozen=True, slots=True)
class StaticCartridgeRouter(CartridgeRouter):
    """Every request uses the same one."""

    cartridge_id: str

    def resolve(self, selection: Selection) -> str | None:
        """See `CartridgeRouter`."""
        return self.cartridge_id


@dataclass(frozen=True, slots=True)
class LabelCartridgeRouter(CartridgeRouter):
    """The request names, under ``extras_key``, the value of the label ``label_key``: of those, the first registered.

    A value that no cartridge carries is an error and no plain request: the client asked for a cartridge.
    """

    registry: Labelled
    label_key: str
    extras_key: str = LABEL_KEY

    @property
    def keys(self) -> frozenset[str]:
        """See `CartridgeRouter`."""
        return frozenset({self.extras_key})

    def resolve(self, selection: Selection) -> str | None:
        """See `CartridgeRouter`."""
        value = selection.value(self.extras_key)
        if value is None:
            return None
        found = self.registry.ids_by_label(self.label_key, value)
        if not found:
            raise UnknownCartridge(
                f"no cartridge is registered with the label {self.label_key}={value!r:.120}",
                hint="to see them: kvist cartridge list",
            )
        return found[0]


@dataclass(frozen=True, slots=True)
class CompositeRouter(CartridgeRouter):
    """The first router that decides. What one of them does not know, a later one may."""

    routers: Sequence[CartridgeRouter]

    @property
    def keys(self) -> frozenset[str]:
        """See `CartridgeRouter`."""
        return frozenset().union(*(router.keys for router in self.routers))

    def resolve(self, selection: Selection) -> str | None:
        """See `CartridgeRouter`; the first error is raised if no router decides."""
        unknown: UnknownCartridge | None = None
        for router in self.routers:
            try:
                found = router.resolve(selection)
            except UnknownCartridge as error:
                unknown = unknown or error
                continue
            if found is not None:
                return found
        if unknown is not None:
            raise unknown
        return None


def build_router_from_config(
    config: Mapping[str, Any] | None,
    registry: Labelled | None = None,
    default_cartridge_id: str | None = None,
) -> CartridgeRouter:
    """Build what ``router`` in a connector's configuration describes.

    Args:
        config: ``{"type": "explicit", "key"}``, ``{"type": "static", "cartridge_id"}``,
            ``{"type": "label", "label_key", "extras_key"}`` or ``{"type": "composite", "routers": [...]}``; without a
            type it is explicit, and an empty one is static with the default.
        registry: for labels.
        default_cartridge_id: for a static router that names none.

    Raises:
        InvalidInput: an unknown type or key, a value of the wrong type, or something is missing.
    """
    if not config:
        return _static({}, None, default_cartridge_id)
    if not isinstance(config, Mapping):
        raise InvalidInput(f"expected a router to be an object with a type, got {config!r:.120}")
    settings = dict(config)
    kind = settings.pop("type", "explicit")
    build = _BUILDERS.get(kind) if isinstance(kind, str) else None
    if build is None:
        raise InvalidInput(f"expected a router of type {', '.join(_BUILDERS)}, got {kind!r:.120}")
    made = build(settings, registry, default_cartridge_id)
    if settings:
        raise InvalidInput(f"a router of type {kind} does not take {', '.join(map(repr, settings))}")
    return made


_Settings = dict[str, Any]


def _take(settings: _Settings, kind: str, key: str, default: str | None) -> str:
    value = settings.pop(key, default)
    if value is None:
        raise InvalidInput(f"a router of type {kind} needs {key}")
    if not isinstance(value, str) or not value:
        raise InvalidInput(f"expected {key} of a router to be text, got {value!r:.120}")
    return value


def _explicit(settings: _Settings, registry: Labelled | None, default: str | None) -> CartridgeRouter:
    return ExplicitCartridgeRouter(_take(settings, "explicit", "key", ID_KEY))


def _static(settings: _Settings, registry: Labelled | None, default: str | None) -> CartridgeRouter:
    return StaticCartridgeRouter(_take(settings, "static", "cartridge_id", default))


def _label(settings: _Settings, registry: Labelled | None, default: str | None) -> CartridgeRouter:
    label_key = _take(settings, "label", "label_key", None)
    extras_key = _take(settings, "label", "extras_key", LABEL_KEY)
    if registry is None:
        raise InvalidInput("a router of type label needs a registry", hint='say where it is: "registry": URL or path')
    return LabelCartridgeRouter(registry, label_key, extras_key)


def _composite(settings: _Settings, registry: Labelled | None, default: str | None) -> CartridgeRouter:
    routers = settings.pop("routers", None)
    if not isinstance(routers, list | tuple) or not routers:
        raise InvalidInput(f"a router of type composite needs routers, a list of at least one, got {routers!r:.120}")
    for one in routers:
        if not isinstance(one, Mapping) or not one:
            raise InvalidInput(f"expected each of routers to be an object with a type, got {one!r:.120}")
    return CompositeRouter(tuple(build_router_from_config(one, registry, default) for one in routers))


_BUILDERS: Final[Mapping[str, Callable[[_Settings, Labelled | None, str | None], CartridgeRouter]]] = {
    "explicit": _explicit,
    "static": _static,
    "label": _label,
    "composite": _composite,
}
