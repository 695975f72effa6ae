"""Tier urls: from what a person types to an open tier."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from kvist.errors import InvalidInput
from kvist.repo.tier.base import PageTier
from kvist.repo.tier.directory import DirectoryTier

_KNOWN: Final = "expected file:///path?max_bytes=50GB, redis://host:6379/0 or mooncake://master:50051"
_SIZE: Final = re.compile(r"([1-9][0-9]{0,17})(?:([KMGT])(i?)B)?")
_EXTRAS: Final = {"redis": "redis", "mooncake": "mooncake"}


def open_tier(url: str) -> PageTier:
    """Open the tier that ``url`` names, without touching it.

    Args:
        url: ``file:///absolute/path?max_bytes=50GB``; ``redis://host:6379/0`` or ``rediss://…`` (TLS), with ``?ttl=``
            and ``timeout=`` in seconds; ``mooncake://master:50051``, with ``?metadata=``, ``host=``, ``protocol=``,
            ``device=``, ``segment=`` and ``buffer=``. Credentials come from the environment.

    Raises:
        InvalidInput: any other form; a url that holds a user or a password, which is not repeated; a package that the
            tier needs is not installed.
    """
    parts = _split(url)
    open_one = _SCHEMES.get(parts.scheme)
    if open_one is None:
        raise InvalidInput(f"a page tier's url starts with {parts.scheme!r}: {_KNOWN}")
    try:
        return open_one(parts)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        raise InvalidInput(
            f"a {parts.scheme}: tier needs the package {package}, which is not installed",
            hint=f"pip install 'kvist[{_EXTRAS[package]}]'",
        ) from error


def parse_size(text: str) -> int:
    """Bytes of ``5000``, ``50GB`` or ``512MiB``.

    Raises:
        InvalidInput: anything else.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise InvalidInput(f"expected a size in bytes or like '50GB', got {text!r:.80}")
    power = "KMGT".index(match[2]) + 1 if match[2] else 0
    return int(match[1]) * int((1024 if match[3] else 1000) ** power)


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise InvalidInput(f"a page tier's url has no such form: {_KNOWN}") from None
    if "@" in parts.netloc:
        raise InvalidInput(
            f"a {parts.scheme}: url holds a user or a password before an '@': expected none, urls are shown",
            hint="set KVIST_REDIS_PASSWORD, and KVIST_REDIS_USERNAME if there is one",
        )
    if parts.fragment or port == 0:
        raise InvalidInput(f"a page tier's url has no '#', and no port 0: {_KNOWN}")
    return parts


def _options(parts: SplitResult, allowed: Collection[str]) -> Mapping[str, str]:
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    options = dict(pairs)
    if len(options) != len(pairs) or options.keys() - set(allowed):
        raise InvalidInput(
            f"a {parts.scheme}: tier's url takes only {', '.join(sorted(allowed))} after its '?', each once; "
            "it never carries a secret"
        )
    return options


def _number(options: Mapping[str, str], name: str) -> int | None:
    value = options.get(name)
    if value is not None and not re.fullmatch(r"[1-9][0-9]{0,8}", value):
        raise InvalidInput(f"expected a whole number from 1 as {name}, got {value!r:.80}")
    return None if value is None else int(value)


def _open_directory(parts: SplitResult) -> PageTier:
    options = _options(parts, {"max_bytes"})
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or "max_bytes" not in options:
        raise InvalidInput(f"a page tier in a directory needs an absolute path and its bound: {_KNOWN}")
    return DirectoryTier(Path(unquote(parts.path)), max_bytes=parse_size(options["max_bytes"]))


def _open_redis(parts: SplitResult) -> PageTier:
    from kvist.repo.tier.redis import TIMEOUT_S, RedisTier

    options = _options(parts, {"ttl", "timeout"})
    db = parts.path.removeprefix("/") or "0"
    if parts.hostname is None or not re.fullmatch(r"[0-9]{1,5}", db):
        raise InvalidInput(f"a {parts.scheme}: tier needs a host, and a number as its database: {_KNOWN}")
    timeout = options.get("timeout", f"{TIMEOUT_S}")
    if not re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,3})?", timeout) or not float(timeout):
        raise InvalidInput(f"expected seconds, such as 0.5, as timeout, got {timeout!r:.80}")
    return RedisTier(
        parts.hostname,
        parts.port or 6379,
        int(db),
        ttl=_number(options, "ttl"),
        tls=parts.scheme == "rediss",
        timeout=float(timeout),
    )


def _open_mooncake(parts: SplitResult) -> PageTier:
    from kvist.repo.tier.mooncake import MooncakeTier

    options = _options(parts, {"metadata", "host", "protocol", "device", "segment", "buffer"})
    if parts.hostname is None or parts.path not in ("", "/"):
        raise InvalidInput(f"a mooncake: tier needs its master's host, and no path: {_KNOWN}")
    return MooncakeTier(
        f"{parts.hostname}:{parts.port or 50051}",
        metadata=options.get("metadata", "P2PHANDSHAKE"),
        host=options.get("host"),
        protocol=options.get("protocol", "tcp"),
        device=options.get("device", ""),
        segment=parse_size(options["segment"]) if "segment" in options else 0,
        buffer=parse_size(options.get("buffer", "128MiB")),
    )


_SCHEMES: Final[Mapping[str, Callable[[SplitResult], PageTier]]] = {
    "file": _open_directory,
    "redis": _open_redis,
    "rediss": _open_redis,
    "mooncake": _open_mooncake,
}
