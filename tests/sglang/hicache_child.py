"""Another process over a store: ``hicache_child.py URL set FIRST END [KEY to expect] [die]``."""

from __future__ import annotations

import os
import signal
import sys

from hicache_pools import PAGES, backend, fill, mha, slots


def main(url: str, first: str, end: str, *words: str) -> int:
    """Store page ``n`` with the content of seed ``n`` under ``k<n>``."""
    pool = mha()
    one = backend(url, pool)
    expected = [word for word in words if word != "die"]
    assert one.batch_exists(expected) == len(expected)
    for number in range(int(first), int(end)):
        fill(pool, number % PAGES, number)
        assert one.batch_set_v1([f"k{number}"], slots(pool, number % PAGES)) == [True]
    if "die" in words:
        os.kill(os.getpid(), signal.SIGKILL)
    one.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *sys.argv[3:]))
