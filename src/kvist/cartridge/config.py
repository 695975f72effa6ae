"""The configuration of a connector or a server: which cartridges there are, and how requests choose them.

Knows the keys of ``kv_connector_extra_config``, those of vLLM's first CartridgeConnector among them. Knows no engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Self, cast, get_args

from kvist.cartridge.library import Entry, Library, default_cache_dir, open_source
from kvist.cartridge.model import ModelIdentity
from kvist.cartridge.placing import PrefixMode
from kvist.cartridge.routing import (
    CartridgeRouter,
    CompositeRouter,
    ExplicitCartridgeRouter,
    StaticCartridgeRouter,
    build_router_from_config,
)
from kvist.cartridge.sources import check_source
from kvist.errors import InvalidInput, UnknownCartridge
from kvist.ids import check_name

if TYPE_CHECKING:
    from kvist.cartridge.registry import Registry

_HOST_BYTES: Final = 1 << 30
_HOST_CARTRIDGES: Final = 8
"""Memory for cartridges where none is configured: a gibibyte, or eight of the largest."""

Unknown = Literal["refuse", "compute"]


@dataclass(frozen=True, slots=True)
class CartridgeSource:
    """One configured cartridge.

    Attributes:
        cartridge_id: by which requests name it; ``None``: as its manifest does.
        source: ``{"path", "manifest_path"?}``, ``{"store", "rev", "sequence"?}`` or ``{"hub", "revision"?,
            "subfolder"?}``.
    """

    cartridge_id: str | None
    source: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class CartridgeConfig:
    """What ``kv_connector_extra_config`` says.

    Attributes:
        sources: ``cartridge_path`` (and ``manifest_path``), or ``cartridges``; the first is the default.
        router: see `build_router_from_config`. ``None``: a request uses what it names, else, where exactly one
            cartridge is configured, that one.
        registry: path or url of a registry, from which cartridges come and go while servers run.
        host_bytes: memory of a worker for cartridges; ``gpu_capacity_bytes`` is another name of it. See `capacity`.
        preload: ids to load before the first request.
        unknown: an id or label that nothing stands for is refused, or such a request is computed without a cartridge.
        prefix: whether a cartridge is placed before the prompt: always (``virtual``), never, since prompts repeat the
            document (``prompt``), or unless the prompt repeats it (``auto``).
        cache_dir: for converted and fetched cartridges.
        model, revision: what the served model is called, where the engine's name for it is not the manifest's.
        verify: whether every byte is checked when a cartridge is loaded. Without it a file that holds something else
            than its manifest says can pass for another cartridge: only for files that nobody else can write.
        other_params: fields of requests that no router reads and that are not refused for it, since another connector
            of the same vLLM reads them.
    """

    sources: tuple[CartridgeSource, ...] = ()
    router: Mapping[str, Any] | None = None
    registry: str | None = None
    host_bytes: int | None = None
    preload: tuple[str, ...] = ()
    unknown: Unknown = "refuse"
    prefix: PrefixMode = "auto"
    cache_dir: Path = dataclasses.field(default_factory=default_cache_dir)
    model: str | None = None
    revision: str | None = None
    verify: bool = True
    other_params: tuple[str, ...] = ()

    @classmethod
    def from_extra(cls, extra: Mapping[str, Any]) -> Self:
        """Read the mapping; touches no file.

        Raises:
            InvalidInput: an unknown key, a value of the wrong type, both forms of naming cartridges, an id twice, or
                neither a cartridge nor a registry.
        """
        keys = {"cartridge_path", "manifest_path", "cartridges", "gpu_capacity_bytes"}
        keys |= {one.name for one in dataclasses.fields(cls)} - {"sources"}
        if unknown := [key for key in extra if key not in keys]:
            raise InvalidInput(
                f"kv_connector_extra_config: expected keys of {', '.join(sorted(keys))}, got "
                f"{', '.join(map(repr, unknown))}"
            )
        _exclude(extra, "cartridge_path", "cartridges")
        _exclude(extra, "host_bytes", "gpu_capacity_bytes")
        if "manifest_path" in extra and "cartridge_path" not in extra:
            raise InvalidInput("manifest_path goes with cartridge_path")
        sources = tuple(_sources(extra))
        if not sources and "registry" not in extra:
            raise InvalidInput("expected cartridge_path, cartridges or registry, got none of them")
        return cls(
            sources=sources,
            router=_typed(extra, "router", Mapping, "an object", None),
            registry=_text(extra, "registry"),
            host_bytes=_bytes(extra, "host_bytes" if "host_bytes" in extra else "gpu_capacity_bytes"),
            preload=tuple(_texts(extra, "preload", "ids")),
            unknown=cast(Unknown, _choice(extra, "unknown", get_args(Unknown))),
            prefix=cast(PrefixMode, _choice(extra, "prefix", get_args(PrefixMode))),
            cache_dir=Path(_text(extra, "cache_dir") or default_cache_dir()).expanduser(),
            model=_text(extra, "model"),
            revision=_text(extra, "revision"),
            verify=_typed(extra, "verify", bool, "true or false", True),
            other_params=tuple(_texts(extra, "other_params", "names")),
        )

    def capacity(self, largest_bytes: int) -> int:
        """Memory for cartridges, where the largest takes ``largest_bytes``."""
        return self.host_bytes or max(_HOST_BYTES, _HOST_CARTRIDGES * largest_bytes)

    def served(self, model: ModelIdentity) -> ModelIdentity:
        """The model under the names that the configuration gives it."""
        return dataclasses.replace(
            model, model_id=self.model or model.model_id, revision=self.revision or model.revision
        )


class Opened(NamedTuple):
    """What a configuration comes to."""

    library: Library
    router: CartridgeRouter


def open_library(config: CartridgeConfig, model: ModelIdentity | None) -> Opened:
    """Find, convert or fetch every configured cartridge, check that it fits, and build the router.

    Args:
        config: of the connector.
        model: that is served; ``None``: cartridges of any are taken.

    Raises:
        KvistError: whatever is wrong with one of them; a server must not start then.
    """
    served = None if model is None else config.served(model)
    entries = [_open(one, config.cache_dir, served) for one in config.sources]
    registry = None if config.registry is None else _open_registry(config.registry)
    try:
        library = Library(entries, registry=registry, model=served, cache_dir=config.cache_dir)
        router = _router(config, library)
        for cartridge_id in config.preload:
            library.get(cartridge_id)
    except BaseException:
        if registry is not None:
            registry.close()
        raise
    return Opened(library, router)


def _open(one: CartridgeSource, cache_dir: Path, model: ModelIdentity | None) -> Entry:
    named = one.cartridge_id is not None and "hub" not in one.source  # what is fetched has a name already
    source = {**one.source, "cartridge_id": one.cartridge_id} if named else one.source
    directory, manifest = open_source(source, cache_dir=cache_dir, model=model)
    return Entry(one.cartridge_id or manifest.cartridge_id, directory, manifest)


def _open_registry(url_or_path: str) -> Registry:
    try:
        from kvist.cartridge.registry import Registry
    except ModuleNotFoundError as error:
        raise InvalidInput(
            f"a registry needs the Python package {error.name}, which is not installed",
            hint="pip install 'kvist[cartridge]'",
        ) from None
    return Registry(url_or_path)


def _router(config: CartridgeConfig, library: Library) -> CartridgeRouter:
    router: CartridgeRouter
    if config.router:
        router = build_router_from_config(config.router, library, library.default_id)
    elif len(config.sources) == 1 and library.default_id is not None:
        router = CompositeRouter((ExplicitCartridgeRouter(), StaticCartridgeRouter(library.default_id)))
    else:
        router = ExplicitCartridgeRouter()
    if library.registry is None:
        known = library.ids()
        for cartridge_id in _static_ids(router):
            if cartridge_id not in known:
                raise UnknownCartridge(f"the static router's {cartridge_id} is none of {', '.join(known)}")
    return router


def _static_ids(router: CartridgeRouter) -> Iterator[str]:
    if isinstance(router, StaticCartridgeRouter):
        yield router.cartridge_id
    elif isinstance(router, CompositeRouter):
        for one in router.routers:
            yield from _static_ids(one)


# -- reading ---------------------------------------------------------------------------------------------------------


def _sources(extra: Mapping[str, Any]) -> Iterator[CartridgeSource]:
    if "cartridge_path" in extra:
        if extra["cartridge_path"] is None:
            raise InvalidInput("expected cartridge_path to be text, got None")
        yield _source({"path": extra["cartridge_path"], "manifest_path": extra.get("manifest_path")})
        return
    listed = _typed(extra, "cartridges", list | tuple, "a list of objects", ())
    if "cartridges" in extra and not listed:
        raise InvalidInput("expected cartridges to be a list of at least one, got an empty one")
    seen = set()
    for one in listed:
        source = _source(one)
        if source.cartridge_id in seen:
            raise InvalidInput(f"expected each cartridge_id once in cartridges, got {source.cartridge_id} twice")
        seen |= {source.cartridge_id} - {None}
        yield source


def _source(one: object) -> CartridgeSource:
    if not isinstance(one, Mapping):
        raise InvalidInput(f"expected each of cartridges to be an object, got {one!r:.120}")
    cartridge_id = _text(one, "cartridge_id")
    if cartridge_id is not None:
        check_name(cartridge_id)
    told = {key: value for key, value in one.items() if key != "cartridge_id" and value is not None}
    source = check_source(told)
    for key in {"path", "manifest_path"} & set(source):
        source[key] = str(Path(source[key]).expanduser())
    return CartridgeSource(cartridge_id, source)


def _exclude(extra: Mapping[str, Any], one: str, other: str) -> None:
    if one in extra and other in extra:
        raise InvalidInput(f"expected one of {one} and {other}, got both")


def _typed(told: Mapping[str, Any], key: str, kind: Any, noun: str, default: Any) -> Any:
    value = told.get(key)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise InvalidInput(f"expected {key} to be {noun}, got {value!r:.120}")
    return value


def _text(told: Mapping[str, Any], key: str) -> str | None:
    value: str | None = _typed(told, key, str, "text", None)
    if value == "":
        raise InvalidInput(f"expected {key} to be text, got ''")
    return value


def _bytes(told: Mapping[str, Any], key: str) -> int | None:
    value: int | None = _typed(told, key, int, "a number of bytes", None)
    if value is not None and (isinstance(value, bool) or value < 1):
        raise InvalidInput(f"expected {key} to be a number of bytes, at least 1, got {value!r}")
    return value


def _texts(told: Mapping[str, Any], key: str, noun: str) -> Iterator[str]:
    for one in _typed(told, key, list | tuple, f"a list of {noun}", ()):
        if not isinstance(one, str) or not one:
            raise InvalidInput(f"expected {key} to be a list of {noun}, got {one!r:.120} in it")
        yield one


def _choice(told: Mapping[str, Any], key: str, choices: tuple[str, ...]) -> str:
    value = told.get(key, choices[0])
    if value not in choices:
        raise InvalidInput(f"expected {key} to be one of {', '.join(choices)}, got {value!r:.120}")
    return str(value)
