"""Operations, and those who count them. Knows names and numbers; must not know who counts, or how."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, ParamSpec, TypeVar

from kvist.errors import KvistError
from kvist.telemetry.spans import span

_P = ParamSpec("_P")
_R = TypeVar("_R")

INTERNAL: Final = "internal"
"""The kind of a failure that is no `KvistError`: a bug of ours, or of a library."""
CANCELLED: Final = "cancelled"
"""The kind of an end that somebody asked for: Ctrl-C, a client that went away."""


class Recorder:
    """Takes up what happens. This one forgets it; override what is to be counted. Called from any thread.

    Bytes and pages are those that were moved or looked at, whatever came of them. ``error`` is the stable kind of the
    failure (`KvistError.kind`, else `INTERNAL` or `CANCELLED`), ``None`` where all went well.
    """

    def operation(self, name: str, seconds: float, *, nbytes: int, pages: int, error: str | None) -> None:
        """An operation has ended: ``snapshot``, ``checkout``, ``fork``, ``gc``, …."""

    def store_call(self, call: str, seconds: float, *, nbytes: int, error: str | None) -> None:
        """A call of a store has ended; ``call`` is the name of the `Store` method."""


class Operation:
    """What one operation has done so far; its code adds to it. For one thread at a time.

    Attributes:
        nbytes: bytes moved or looked at.
        pages: page halves.
    """

    __slots__ = ("nbytes", "pages")

    def __init__(self) -> None:
        self.nbytes = self.pages = 0

    def add(self, *, nbytes: int = 0, pages: int = 0) -> None:
        """Count more."""
        self.nbytes += nbytes
        self.pages += pages


_lock: Final = threading.Lock()
_recorders: tuple[Recorder, ...] = ()


def recorders() -> tuple[Recorder, ...]:
    """Those who count now; none unless somebody asked for it."""
    return _recorders


def add_recorder(recorder: Recorder) -> None:
    """Have ``recorder`` told of everything in this process from now on."""
    global _recorders
    with _lock:
        _recorders = (*_recorders, recorder)


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Have ``recorder`` told of everything in this process meanwhile."""
    global _recorders
    add_recorder(recorder)
    try:
        yield
    finally:
        with _lock:
            _recorders = tuple(one for one in _recorders if one is not recorder)


@contextmanager
def operation(name: str, **attributes: str | int) -> Iterator[Operation]:
    """One operation, as a span ``kvist.<name>`` and as a count for the recorders.

    Args:
        name: one word or two (``put_pages``); a label of metrics, so never made of what a user typed.
        attributes: of the span alone; here names of branches and cids are welcome.
    """
    done, error, started = Operation(), None, time.perf_counter()
    with span(f"kvist.{name}", {f"kvist.{key}": value for key, value in attributes.items()}) as current:
        try:
            yield done
        except BaseException as failure:
            error = kind_of(failure)
            raise
        finally:
            seconds = time.perf_counter() - started
            current.set_attributes({"kvist.bytes": done.nbytes, "kvist.pages": done.pages})
            for recorder in _recorders:
                recorder.operation(name, seconds, nbytes=done.nbytes, pages=done.pages, error=error)


def _nothing(_: object) -> tuple[int, int]:
    return 0, 0


def counted(
    name: str, moved: Callable[[Any], tuple[int, int]] = _nothing
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Make each call of a function an `operation`.

    Args:
        name: of the operation.
        moved: bytes and pages, by the function's result.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            with operation(name) as done:
                result = function(*args, **kwargs)
                done.nbytes, done.pages = moved(result)
                return result

        return call

    return decorate


def kind_of(failure: BaseException) -> str:
    """The stable kind of a failure."""
    if isinstance(failure, KvistError):
        return failure.kind
    is_wanted = isinstance(failure, KeyboardInterrupt | SystemExit | GeneratorExit | asyncio.CancelledError)
    return CANCELLED if is_wanted else INTERNAL
