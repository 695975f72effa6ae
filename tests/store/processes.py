"""What the tests run in other processes. Imports only kvist."""

import os
import signal
import sys
from pathlib import Path

from kvist.errors import Conflict
from kvist.store import LocalStore, Match


def count_up(root: Path, times: int) -> None:
    store = LocalStore(root)
    for _ in range(times):
        while True:
            info = store.head("refs/n")
            assert info is not None
            try:
                store.put("refs/n", b"%d" % (int(store.get("refs/n")) + 1), mode=Match(info.etag))
                break
            except Conflict:
                continue


def die_writing(root: Path, how: str) -> None:
    """Be killed, as by kill -9, in the middle of a write."""
    store = LocalStore(root)
    if how == "writer":
        writer = store.writer("segments/1")
        writer.write(bytes(40 << 20))
    else:
        os.fdatasync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
        store.put("segments/1", bytes(1 << 20))
    os.kill(os.getpid(), signal.SIGKILL)


def hold_writer(root: Path) -> None:
    """Write, say so, wait for a line, commit."""
    with LocalStore(root).writer("segments/1") as writer:
        writer.write(b"slow")
        print("written", flush=True)
        sys.stdin.readline()
        writer.commit()


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
