"""What pins the KV that an engine computes of given tokens. Knows the weights' files; must not know the engine."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from kvist.errors import UnsupportedModel
from kvist.hashing import weights

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_revision: Final = functools.cache(weights.revision)


def pinned(directory: Path, *, given: str | None, asked: str | None, changes: Mapping[str, Any], option: str) -> str:
    """The revision of a layout: the weights, and what the command line changes about the model.

    Args:
        directory: of the model, as the engine was given it; it need not exist.
        given: what pins the weights, if an operator said so.
        asked: the revision that the engine was asked for, which pins them if it is a commit.
        changes: by name, what the command line changes; what it leaves alone is ``None``, or false.
        option: where an operator says what pins them, for the message.

    Raises:
        UnsupportedModel: nothing says which weights they are.
    """
    found = given
    if found is None and directory.is_dir():
        found = _revision(directory)
    if found is None and _COMMIT.fullmatch(asked or ""):
        found = asked
    if found is None:
        raise UnsupportedModel(
            f"nothing pins the weights of {directory}: give a commit as `--revision`, or `revision` {option}"
        )
    if any(changes.values()):
        found += "+" + hashlib.sha256(repr(sorted(changes.items())).encode()).hexdigest()[:16]
    return found
