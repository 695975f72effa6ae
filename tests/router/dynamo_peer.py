"""NVIDIA Dynamo's router as a child process. Runs under another interpreter, which has dynamo and not kvist.

One JSON array a line on stdin: the name of a function below, and its arguments. One JSON value a line on stdout.
"""

import asyncio
import inspect
import json
import os
import sys
from typing import Any

from dynamo._core import RadixTree, SelectionService, __version__

_tree = RadixTree()
_service: Any = None


def version() -> str:
    return str(__version__)


def tree_reset() -> None:
    global _tree
    _tree = RadixTree()


def tree_remove_worker(worker: int) -> None:
    _tree.remove_worker(worker)


def tree_apply(worker: int, events: list[str]) -> list[str]:
    """What it did not like."""
    errors = []
    for event in events:
        try:
            _tree.apply_event(worker, event.encode())
        except RuntimeError as error:
            errors.append(str(error))
    return errors


def tree_dump() -> list[str]:
    return list(_tree.dump_tree_as_events())


def tree_find(queries: list[list[int]]) -> list[list[list[int]]]:
    """Of each query ``[worker, rank, depth]`` of all that hold its first block."""
    return [
        [[worker, rank, depth] for (worker, rank), depth in _tree.find_matches(query).scores.items()]
        for query in queries
    ]


async def service_start(workers: list[dict[str, Any]]) -> None:
    global _service
    _service = SelectionService(indexer_threads=1)
    for worker in workers:
        # JSON has no integer keys.
        endpoints = {int(rank): endpoint for rank, endpoint in worker["kv_events_endpoints"].items()}
        taken = await _service.upsert_worker({**worker, "kv_events_endpoints": endpoints})
        assert taken["lifecycle"] == "schedulable", taken


async def service_overlaps(requests: list[dict[str, Any]]) -> list[Any]:
    return [(await _service.overlap_scores(request))["workers"] for request in requests]


async def service_call(method: str, *arguments: Any) -> Any:
    """A method by its name."""
    value = getattr(_service, method)(*arguments)
    return await value if inspect.isawaitable(value) else value


async def service_snapshot() -> list[str]:
    """All events of all models, as `tree_dump` has them."""
    snapshot = await _service.indexer_snapshot()
    return [json.dumps(event) for model in snapshot.values() for event in model["events"]]


async def main() -> None:
    # What dynamo prints goes elsewhere.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    tree = (tree_reset, tree_apply, tree_remove_worker, tree_dump, tree_find)
    service = (service_start, service_overlaps, service_call, service_snapshot)
    known = {function.__name__: function for function in (version, *tree, *service)}
    while line := await asyncio.to_thread(sys.stdin.readline):
        name, *arguments = json.loads(line)
        value = known[name](*arguments)
        print(json.dumps(await value if asyncio.iscoroutine(value) else value), file=answers, flush=True)


asyncio.run(main())
