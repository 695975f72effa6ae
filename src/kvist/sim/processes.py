"""Many tasks over one thing, in processes of this machine."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from kvist.errors import EngineError

Progress = Callable[[int, int], None]  # told how many of how many are done

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def told(results: Iterable[_Result], total: int, progress: Progress | None) -> list[_Result]:
    """The results, as they come, each of them told of."""
    done = []
    for result in results:
        done.append(result)
        if progress is not None:
            progress(len(done), total)
    return done


@contextmanager
def workers(
    jobs: int, keep: Callable[..., None], kept: tuple[Any, ...], progress: Progress | None
) -> Iterator[Callable[[Callable[[_Task], _Result], Sequence[_Task]], list[_Result]]]:
    """Processes that live for the block; what it gets does tasks in them, and returns the results in order.

    Args:
        jobs: how many.
        keep: called in each of them first.
        kept: its arguments, sent once and not with every task.
        progress: told how many tasks are done.

    Raises:
        EngineError: a process ended by itself.
    """
    spawn = multiprocessing.get_context("spawn")  # a fork would copy whatever threads of the caller hold
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=keep, initargs=kept) as pool:

        def do(work: Callable[[_Task], _Result], tasks: Sequence[_Task]) -> list[_Result]:
            try:
                return told(pool.map(work, tasks), len(tasks), progress)
            except BrokenProcessPool as error:
                raise EngineError(
                    "a process that replayed ended by itself, perhaps for want of memory", hint="use fewer --jobs"
                ) from error

        yield do
