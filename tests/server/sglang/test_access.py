"""Who may come to kvist's routes in SGLang's API server."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvist.errors import Forbidden
from kvist.server.live.gate import Door
from kvist.server.sglang.dialect import SGLANG
from kvist.server.sglang.plugin import listening

SCOPE = {"type": "http", "method": "POST", "path": "/v1/processfork/snapshot", "headers": []}


@pytest.mark.parametrize(
    ("host", "api_key", "admin_api_key", "is_closed"),
    [
        ("127.0.0.1", None, None, False),
        ("0.0.0.0", "secret", None, False),
        ("0.0.0.0", None, None, True),
        ("0.0.0.0", None, "secret", True),
    ],
)
def test_nothing_is_open_beyond_this_machine(
    host: str, api_key: str | None, admin_api_key: str | None, is_closed: bool
) -> None:
    """SGLang asks for its admin's key on its own admin's routes only: where there is no other, ours are closed."""
    door = Door(SGLANG)
    door.configure(None, listening(SimpleNamespace(host=host, api_key=api_key, admin_api_key=admin_api_key)))
    if is_closed:
        with pytest.raises(Forbidden, match="asks nobody who is there"):
            door.require(SCOPE)
    else:
        door.require(SCOPE)
