"""Where a remote store is: a bucket and a prefix behind an endpoint, or the root of a web server. Never a secret.

Knows urls and the environment's names for endpoints; knows no client.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, NoReturn
from urllib.parse import SplitResult, parse_qsl, quote, urlencode, urlsplit

from kvist.errors import InvalidInput
from kvist.store.base import check_key

Scheme = Literal["s3", "gs", "az", "http", "https"]

SCHEMES: Final[Mapping[str, Scheme]] = {
    "s3": "s3",
    "gs": "gs",
    "gcs": "gs",
    "az": "az",
    "azure": "az",
    "http": "http",
    "https": "https",
}
"""What a url may start with, and the store that it means."""

CREDENTIALS: Final[Mapping[Scheme, str]] = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, GOOGLE_SERVICE_ACCOUNT, or the machine's role",
    "az": "AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN, or the machine's identity",
    "http": "no credentials: kvist sends none to a web server",
    "https": "no credentials: kvist sends none to a web server",
}
"""Where the secrets of each come from: the environment and what the provider's own clients look for, never a url."""

_OPTIONS: Final[Mapping[Scheme, frozenset[str]]] = {
    "s3": frozenset({"endpoint", "region", "style"}),
    "gs": frozenset({"endpoint"}),
    "az": frozenset({"endpoint", "account"}),
    "http": frozenset(),
    "https": frozenset(),
}
_ENDPOINTS: Final[Mapping[Scheme, tuple[str, ...]]] = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
    "http": (),
    "https": (),
}
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
_VALUE: Final = re.compile(r"[A-Za-z0-9-]{1,64}")
_HOST: Final = re.compile(r"[A-Za-z0-9.-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")


@dataclass(frozen=True, slots=True)
class Location:
    """One remote store's place.

    Attributes:
        scheme: which protocol.
        bucket: bucket or container; for a web server its host and port.
        prefix: what comes before every key, without slashes at its ends; may be empty. For a web server: its path.
        endpoint: the server's ``http(s)://host``, where it is not the provider's own; else ``None``.
        options: what else the url said: ``region`` and ``style`` (``path`` or ``virtual``) for S3, ``account`` for
            Azure.
    """

    scheme: Scheme
    bucket: str
    prefix: str = ""
    endpoint: str | None = None
    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, url: str, environ: Mapping[str, str] = os.environ) -> Location:
        """Read a url; the endpoint may also come from the provider's usual variable.

        Raises:
            InvalidInput: it is none of ours, or it holds a user, a password or a key. What it held is not repeated.
        """
        parts = urlsplit(url)
        scheme = SCHEMES[parts.scheme.lower()]
        form = f"{scheme}://HOST/PATH" if scheme in ("http", "https") else f"{scheme}://BUCKET/PREFIX"
        if "@" in parts.netloc:
            _refuse_secret(scheme)
        pattern = _HOST if scheme in ("http", "https") else _BUCKET
        if not pattern.fullmatch(parts.netloc) or parts.fragment:
            raise InvalidInput(f"expected {form}, got {_shown(parts)}")
        prefix = parts.path.strip("/")
        if prefix and scheme not in ("http", "https"):
            check_key(prefix)
        options = _read_options(scheme, parts)
        endpoint = options.pop("endpoint", None)
        if endpoint is None:
            endpoint = next((environ[name] for name in _ENDPOINTS[scheme] if environ.get(name)), None)
        if endpoint is not None:
            endpoint = _check_endpoint(scheme, endpoint)
        return cls(scheme, parts.netloc, prefix, endpoint, tuple(sorted(options.items())))

    @property
    def url(self) -> str:
        """The canonical url: what `parse` makes this location from."""
        query = dict(self.options)
        if self.endpoint is not None:
            query["endpoint"] = self.endpoint
        path = f"/{self.prefix}" if self.prefix else ""
        return f"{self.scheme}://{self.bucket}{path}" + ("?" + urlencode(query, safe=":/[]") if query else "")

    @property
    def is_plain(self) -> bool:
        """Whether it is reached without TLS."""
        return self.scheme == "http" or (self.endpoint or "").startswith("http://")


def _read_options(scheme: Scheme, parts: SplitResult) -> dict[str, str]:
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    allowed = _OPTIONS[scheme]
    if len(dict(pairs)) != len(pairs) or not {name for name, _ in pairs} <= allowed:
        said = "only " + ", ".join(sorted(allowed)) if allowed else "nothing"
        raise InvalidInput(
            f"a {scheme}: url takes {said} after its '?', each once; it never carries a secret",
            hint=f"credentials come from {CREDENTIALS[scheme]}",
        )
    options = dict(pairs)
    for name, value in options.items():
        if name == "style" and value not in ("path", "virtual"):
            raise InvalidInput("expected style=path or style=virtual after a s3: url's '?'")
        if name in ("region", "account") and not _VALUE.fullmatch(value):
            raise InvalidInput(f"expected letters, digits and '-' as a {scheme}: url's {name}")
    return options


def _check_endpoint(scheme: Scheme, endpoint: str) -> str:
    parts = urlsplit(endpoint)
    if "@" in parts.netloc:
        _refuse_secret(scheme)
    if parts.scheme not in ("http", "https") or not _HOST.fullmatch(parts.netloc) or parts.query or parts.fragment:
        raise InvalidInput(f"expected http://HOST:PORT or https://HOST as the endpoint of a {scheme}: url")
    return endpoint.rstrip("/")


def _refuse_secret(scheme: Scheme) -> NoReturn:
    raise InvalidInput(
        f"a {scheme}: url or its endpoint holds a user or a password before an '@': expected none, urls are shown",
        hint=f"credentials come from {CREDENTIALS[scheme]}",
    )


def _shown(parts: SplitResult) -> str:
    """The url without what may be secret."""
    return repr(f"{parts.scheme}://{quote(parts.netloc)}{parts.path}"[:200])
