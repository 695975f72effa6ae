"""What vLLM makes of a request's name (0.28 to 0.32), and how one finds back. Pure: imports no vLLM.

A client's X-Request-Id, or a name that vLLM draws, becomes ``cmpl-<name>-<number of the prompt>``, or of a chat
``chatcmpl-<name>``. Each of several choices is a request of its own, ``<number>_<id>``. To each id vLLM may add ``-``
and eight hex digits.
"""

from __future__ import annotations

import re
from typing import Final

from kvist.engines.paged import requests

_SUFFIX: Final = re.compile(r"-[0-9a-f]{8}\Z")
_CHOICE: Final = re.compile(r"^\d+_|-\d+$")


def sequence_id(request_id: str) -> str:
    """What a snapshot calls a request's sequence: vLLM's id without the part that it draws."""
    return requests.sequence_id(_SUFFIX.sub("", request_id))


def is_called(request_id: str, wanted: str) -> bool:
    """Whether a client that says ``wanted`` means this request: its id, the answer's, or its X-Request-Id."""
    name = _SUFFIX.sub("", request_id)
    meant = re.fullmatch(rf"(?:\d+_)?(?:(?:chat)?cmpl-)?{re.escape(wanted)}(?:-\d+)?", name)
    return wanted == request_id or meant is not None


def request_of(name: str) -> str:
    """The name of what a sequence is one choice, or one prompt, of: without the number that says which, if any."""
    return _CHOICE.sub("", name, count=1)
