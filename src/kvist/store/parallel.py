"""Many calls of one store at once. Knows how many it likes; knows nothing of what they do."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from kvist.store.base import Store

_K = TypeVar("_K")
_T = TypeVar("_T")


def in_parallel(call: Callable[[_K], _T], keys: Iterable[_K], store: Store) -> Iterator[_T]:
    """``call`` of each key, in order, with as many in flight as ``store`` likes; few results wait in memory."""
    left = iter(keys)
    with ThreadPoolExecutor(store.parallel, thread_name_prefix="kvist-parallel") as pool:
        while chunk := [*itertools.islice(left, 2 * store.parallel)]:
            yield from (pool.map(call, chunk) if len(chunk) > 1 else map(call, chunk))
