"""Files of JSON lines that people write: conversations, questions. Must not know what is in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from kvist.errors import InvalidInput

_MAX_LINE: Final = 2**24


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines, with their numbers.

    Raises:
        InvalidInput: the file cannot be read, is empty, or a line is no object; it is named.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot read {str(path)!r}: {error}") from error
    number = 0
    for number, line in enumerate(lines, 1):
        try:
            document = json.loads(line) if len(line) <= _MAX_LINE else None
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            raise InvalidInput(f"{path}:{number}: expected one JSON object, got {line!r:.80}")
        yield number, document
    if number == 0:
        raise InvalidInput(f"{path}: expected at least one line, got none")
