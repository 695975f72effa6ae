"""From a location to an obstore client: endpoints, credentials of the environment, time limits, retries."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, Final

from obstore.exceptions import BaseError, NotFoundError
from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

from kvist.errors import InvalidInput
from kvist.store.location import Location
from kvist.store.refusal import Refusal

MISSING: Final = (NotFoundError, FileNotFoundError)
"""What obstore raises for an object that is not there."""
FAILURES: Final = (BaseError, FileNotFoundError, NotImplementedError, OSError)
"""All that obstore raises."""
_RETRIES: Final = 15
"""What is refused at once is tried so often, with pauses that grow by chance: for half a minute, more or less."""

Client = S3Store | GCSStore | AzureStore | HTTPStore


def open_client(location: Location, retry_for: float = 30.0, idle: float = 60.0, timeout: float = 600.0) -> Client:
    """A client for ``location``.

    Args:
        location: where it is.
        retry_for: seconds after which a request that keeps failing, or that has stalled, is given up.
        idle: seconds for which nothing of an answer need come; the time in which a body is sent counts too
            (https://github.com/seanmonstar/reqwest/issues/2784, open in November 2026).
        timeout: seconds that one attempt may take, from its connection to its last byte.

    Raises:
        InvalidInput: the environment's configuration cannot be.
    """
    options = dict(location.options)
    common: dict[str, Any] = {
        "client_options": {
            "allow_http": location.is_plain,
            "connect_timeout": timedelta(seconds=min(5.0, idle)),
            "read_timeout": timedelta(seconds=idle),
            "timeout": timedelta(seconds=timeout),
        },
        "retry_config": {
            "max_retries": _RETRIES,
            "retry_timeout": timedelta(seconds=retry_for + idle),  # counted from the start: the first may have stalled
            "backoff": {
                "init_backoff": timedelta(milliseconds=100),
                "max_backoff": timedelta(seconds=5),
                "base": 3,
            },
        },
    }
    if location.scheme not in ("http", "https") and location.prefix:
        common["prefix"] = location.prefix
    try:
        match location.scheme:
            case "s3":
                return _open_s3(location, options, common)
            case "gs":
                if location.endpoint is not None:
                    common["base_url"] = location.endpoint
                return GCSStore(location.bucket, **common)
            case "az":
                if "account" in options:
                    common["account_name"] = options["account"]
                if location.endpoint is not None:
                    common["endpoint"] = location.endpoint
                return AzureStore(location.bucket, **common)
            case _:
                return HTTPStore(location.url, **common)
    except FAILURES as error:
        raise InvalidInput(f"cannot open {location.url}: {Refusal.read(error).message}") from None


def _open_s3(location: Location, options: dict[str, str], common: dict[str, Any]) -> S3Store:
    if location.endpoint is not None:
        common["endpoint"] = location.endpoint
    if "region" in options:
        common["region"] = options["region"]
    if options.get("style") == "virtual":
        common["virtual_hosted_style_request"] = True
    if os.environ.get("AWS_PROFILE") and not os.environ.get("AWS_ACCESS_KEY_ID"):
        try:
            from obstore.auth.boto3 import Boto3CredentialProvider
        except ImportError:
            raise InvalidInput("AWS_PROFILE is set: boto3 reads it", hint="pip install boto3") from None
        common["credential_provider"] = Boto3CredentialProvider()
    return S3Store(location.bucket, **common)
