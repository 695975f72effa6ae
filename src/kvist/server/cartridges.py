"""Cartridges over HTTP: what a server can serve, and, where it has a registry, what comes and goes while it runs.

Knows a library; must not know engines. Requests that use a cartridge are never touched: they hold what they need.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kvist.cartridge.library import Library, Source, open_source
from kvist.cartridge.manifest import CartridgeManifest
from kvist.errors import AlreadyExists, Conflict, NotFound, UnknownCartridge
from kvist.ids import check_name
from kvist.repo import Repository
from kvist.server.errors import BadRequest
from kvist.server.schema import BODY_MAX, CartridgeBody, read_body
from kvist.server.wire import guarded, json_response

if TYPE_CHECKING:
    from kvist.cartridge.registry import Registry  # a database's client, which few need

PATH: Final = "/v1/kvist/cartridges"

Admit = Callable[[Library, CartridgeManifest, Path], None]
"""Raises if a server cannot use the cartridge of this manifest in this directory."""

_T = TypeVar("_T")
_THREADS: Final = 8
_BESIDE: Final = {"path": "manifest_path", "store": "rev", "hub": "revision"}
"""Where a cartridge comes from, and what else may be said of it."""


def cartridge_routes(
    library: Callable[[], Library], *, prefix: str = PATH, body_max: int = BODY_MAX, admit: Admit | None = None
) -> list[Route]:
    """The routes, below ``prefix``.

    Args:
        library: gives the server's; may raise what then is the answer.
        prefix: of their paths.
        body_max: bytes of a body.
        admit: asked before a cartridge is registered.
    """
    # Their own threads: what is registered may have to be fetched or converted, and nobody else must wait for that.
    registering, looking = CapacityLimiter(_THREADS), CapacityLimiter(_THREADS)

    async def listed(request: Request) -> Response:
        return json_response(await _in_thread(partial(_list, library()), looking))

    async def shown(request: Request) -> Response:
        return json_response(await _in_thread(partial(_show, library(), request.path_params["cartridge_id"]), looking))

    async def added(request: Request) -> Response:
        body = await read_body(request, CartridgeBody, body_max)
        return json_response(await _in_thread(partial(_add, library(), body, admit), registering))

    async def removed(request: Request) -> Response:
        return json_response(
            await _in_thread(partial(_remove, library(), request.path_params["cartridge_id"]), looking)
        )

    one = prefix + "/{cartridge_id:path}"
    return [
        Route(prefix, guarded(listed), methods=["GET"]),
        Route(prefix, guarded(added), methods=["POST"]),
        Route(one, guarded(shown), methods=["GET"]),
        Route(one, guarded(removed), methods=["DELETE"]),
    ]


async def _in_thread(work: Callable[[], _T], limiter: CapacityLimiter) -> _T:
    return await to_thread.run_sync(work, limiter=limiter)


# -- in threads ----------------------------------------------------------------------------------------------------


def _list(library: Library) -> dict[str, Any]:
    library.refresh()
    records: list[dict[str, Any]] = []
    for cartridge_id, manifest, error in library.known():  # nothing is opened for a list
        record = _record(library, cartridge_id, manifest)
        if error is not None:
            record["error"] = {"code": error.kind, "message": str(error)}
        records.append(record)
    return {"cartridges": records, "default": library.default_id, "has_registry": library.registry is not None}


def _show(library: Library, cartridge_id: str) -> dict[str, Any]:
    library.refresh()
    entry = library.get(cartridge_id)
    return _record(library, cartridge_id, entry.manifest) | {"manifest": entry.manifest.to_dict()}


def _add(library: Library, body: CartridgeBody, admit: Admit | None = None) -> dict[str, Any]:
    registry = _registry(library)
    source = _source(body)
    if isinstance(source, Mapping) and "store" in source:
        with Repository.open(source["store"]) as repo:
            source = {**source, "rev": repo.resolve(source["rev"])}  # a branch may move
    directory, manifest = open_source(source, cache_dir=library.cache_dir, model=library.model)
    if isinstance(source, Mapping) and "hub" in source and not Path(source["hub"]).is_dir():
        source = {**source, "revision": directory.name}  # the commit, for the same reason
    if library.model is not None:
        manifest.require(library.model)
    cartridge_id = check_name(body.cartridge_id or manifest.cartridge_id)
    _check_not_configured(library, cartridge_id)
    if admit is not None:
        admit(library, manifest, directory)
    named = dataclasses.replace(manifest, cartridge_id=cartridge_id, labels={**manifest.labels, **body.labels})
    location = str(directory) if isinstance(source, str) else json.dumps(source)
    try:
        registry.register(named, location, replace=body.replace)
    except AlreadyExists:
        known = registry.lookup(cartridge_id)
        if known is not None and known.manifest.identity != manifest.identity:
            raise AlreadyExists(
                f"cartridge {cartridge_id!r} is registered with the content {known.manifest.identity}, got "
                f"{manifest.identity}",
                hint='to replace it: "replace": true',
            ) from None
        registry.register(named, location)  # the same content: what is said of it is new
    library.refresh()
    return _record(library, cartridge_id, library.get(cartridge_id).manifest)


def _remove(library: Library, cartridge_id: str) -> dict[str, Any]:
    registry = _registry(library)
    _check_not_configured(library, cartridge_id)
    if not registry.unregister(cartridge_id):
        raise UnknownCartridge(f"no cartridge {cartridge_id!r:.120} is registered")
    library.refresh()
    return {"id": cartridge_id, "removed": True}


def _registry(library: Library) -> Registry:
    if library.registry is None:
        raise NotFound(
            "this server has no registry: its cartridges are those of its configuration",
            hint='start it with "registry": a path or a url',
        )
    return library.registry


def _check_not_configured(library: Library, cartridge_id: str) -> None:
    if cartridge_id in library.configured_ids:
        raise Conflict(
            f"cartridge {cartridge_id!r} is one of the server's configuration, which hides registered ones of that id "
            "and stays while the server runs"
        )


def _source(body: CartridgeBody) -> Source:
    kinds = {name: value for name in _BESIDE if (value := getattr(body, name)) is not None}
    if len(kinds) != 1:
        raise BadRequest(f"expected one of path, store and hub, got {', '.join(kinds) or 'none'}", param="path")
    (kind,) = kinds
    for of, name in _BESIDE.items():
        if of != kind and getattr(body, name) is not None:
            raise BadRequest(f"{name}: goes with {of}, got {kind}", param=name)
    if kind == "store" and body.rev is None:
        raise BadRequest("rev: expected a snapshot of the store", param="rev")
    if body.path is not None and not Path(body.path).is_absolute():
        raise BadRequest(f"path: expected an absolute one, got {body.path!r:.200}", param="path")
    extra = getattr(body, _BESIDE[kind])
    if body.path is not None and extra is None:
        return body.path
    return {**kinds, **({_BESIDE[kind]: extra} if extra is not None else {})}


def _record(library: Library, cartridge_id: str, manifest: CartridgeManifest) -> dict[str, Any]:
    return {
        "id": cartridge_id,
        "identity": manifest.identity,
        "tokens": manifest.num_tokens_raw,
        "bytes": sum(file.size for file in manifest.files),
        "model": manifest.model_id,
        "dtype": manifest.dtype,
        "training_steps": manifest.training_steps,
        "has_token_ids": manifest.has_token_ids,
        "labels": dict(manifest.labels),
        "default": cartridge_id == library.default_id,
    }
