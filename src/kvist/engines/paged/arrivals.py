"""What became of one rank's loads, until the engine asks. Knows requests by id, and blocks; must not know pages."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from kvist.engines.paged.plans import Load, Report


class Arrivals:
    """Loads that have ended: threads tell, the engine's thread takes. Thread-safe.

    Attributes:
        loads, failed: so many, since the start.
        pages: written into the cache by those that did not fail.
        nbytes, seconds: of the same; loads beside each other count each.
    """

    def __init__(self) -> None:
        self.loads = self.failed = self.pages = self.nbytes = 0
        self.seconds = 0.0
        self._lock = threading.Lock()
        self._arrived: set[str] = set()
        self._failed: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._report = Report()

    @property
    def ended(self) -> int:
        """Loads that ended since the start, either way."""
        return self.loads + self.failed

    def arrive(self, load: Load, nbytes: int, seconds: float) -> None:
        """A request has its pages."""
        with self._lock:
            self.loads += 1
            self.pages += len(load.pages)
            self.nbytes += nbytes
            self.seconds += seconds
            self._arrived.add(load.request_id)
            if nbytes:
                self._report.loads.append((nbytes, seconds))

    def fail(self, load: Load, gone: Iterable[tuple[int, str]] = ()) -> None:
        """A request does not get its pages: none of its blocks may be used.

        Args:
            load: that failed.
            gone: (group, block hash) of pages that are nowhere any more.
        """
        with self._lock:
            self.failed += 1
            self._failed.add(load.request_id)
            self._bad_blocks |= {place.block for place, _ in load.pages}
            self._report.failed.append(load.request_id)
            self._report.gone += gone

    def take(self) -> tuple[set[str], set[str], set[int]]:
        """Requests whose loads ended since the last call: those that have their pages, the others, and their blocks."""
        with self._lock:
            taken = self._arrived, self._failed, self._bad_blocks
            self._arrived, self._failed, self._bad_blocks = set(), set(), set()
            return taken

    def take_report(self) -> Report | None:
        """What else happened since the last call, for the side that decides; ``None``: nothing."""
        with self._lock:
            report, self._report = self._report, Report()
        return report if report != Report() else None
