"""Processes that do one operation and are killed with SIGKILL: ``python -m repo.kills``, in ``tests/``.

A line of JSON in is a job, a line of JSON out what became of it. Each job runs in a fork of its own: real processes,
without the time that an interpreter takes to start.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from kvist.repo import Repository
from kvist.store import LocalStore
from kvist.testing.faults import CrashingStore

from .operations import OPERATIONS, WORLDS, ahead, save, world

TESTS = Path(__file__).parent.parent


class Killer:
    """Starts operations, and kills them."""

    def __enter__(self) -> Self:
        self._worlds = tempfile.TemporaryDirectory()
        save(world(), Path(self._worlds.name) / "world")
        save(ahead(), Path(self._worlds.name) / "ahead")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "repo.kills"],
            cwd=TESTS,
            env=os.environ | {WORLDS: self._worlds.name},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        self._worlds.cleanup()

    def run(
        self,
        operation: str,
        root: Path,
        *,
        write: int = 0,
        after: bool = False,
        delay: float | None = None,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Let a process do it.

        Args:
            operation: a key of `OPERATIONS`.
            root: of the repository.
            write: it kills itself at this write to the store, counted from 1; 0: never.
            after: once that is done, instead of before.
            delay: seconds after which it is killed from outside.
            seed: of the order in which it deletes.

        Returns:
            ``killed``: whether it was; ``writes`` and ``seconds`` of a run that ended by itself.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        job = {"operation": operation, "root": str(root), "write": write, "after": after, "delay": delay, "seed": seed}
        print(json.dumps(job), file=self._process.stdin, flush=True)
        done: dict[str, Any] = json.loads(self._process.stdout.readline())
        assert "error" not in done, done
        return done


def _do(job: dict[str, Any]) -> dict[str, Any]:
    store = CrashingStore(
        LocalStore(Path(job["root"])),
        job["write"] or None,
        after=job["after"],
        crash=lambda: os.kill(os.getpid(), signal.SIGKILL),
        seed=job["seed"],
    )
    started = time.perf_counter()
    OPERATIONS[job["operation"]].act(Repository.open(store))
    return {"writes": store.writes, "seconds": time.perf_counter() - started}


def _fork(job: dict[str, Any]) -> dict[str, Any]:
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            done = _do(job)
        except BaseException as error:
            done = {"error": repr(error)}
        os.write(writer, json.dumps(done).encode())
        os._exit(0)  # nothing of the parent's is flushed or closed
    os.close(writer)
    if job["delay"] is not None:
        time.sleep(job["delay"])
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    return {"killed": os.WIFSIGNALED(status), **(json.loads(said) if said else {})}


if __name__ == "__main__":
    world(), ahead()  # read once, before any fork
    for line in sys.stdin:
        print(json.dumps(_fork(json.loads(line))), flush=True)
