"""What requests and their sequences are called, and the salts they came under. Knows names; must not know engines."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import TypeVar

from kvist.engines.paged.plans import SequencePlan
from kvist.errors import InvalidName
from kvist.ids import check_name

_T = TypeVar("_T")


def digest(salt: str | None) -> str | None:
    """Of a cache salt, which may be a secret."""
    return None if salt is None else sha256(b"kvist salt\0" + salt.encode()).hexdigest()[:16]


def sequence_id(name: str) -> str:
    """What a snapshot calls the sequence of a request; a digest where its own name is none for a snapshot."""
    try:
        return check_name(name)
    except InvalidName:
        return "request-" + sha256(name.encode()).hexdigest()[:16]


def newest(ended: Iterable[_T], name: Callable[[_T], str]) -> list[_T]:
    """One of each name, the first that comes."""
    found: dict[str, _T] = {}
    for each in ended:
        found.setdefault(name(each), each)
    return list(found.values())


def told_apart(sequences: Sequence[SequencePlan]) -> list[SequencePlan]:
    """The sequences, those of one name told apart: a client may use an X-Request-Id twice."""
    taken: set[str] = set()
    found = []
    for sequence in sequences:
        names = itertools.chain([sequence.id], (f"{sequence.id}.{count}" for count in itertools.count(2)))
        name = next(name for name in names if name not in taken)
        taken.add(name)
        found.append(replace(sequence, id=name))
    return found
