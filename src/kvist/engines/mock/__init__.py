"""A live engine without a GPU: the simulator's scheduler and pool, by the clock on the wall, with vLLM's events.

Knows `kvist.sim`, block hashes and events. Must not know sockets, HTTP or text.
"""

from __future__ import annotations

from kvist.engines.mock.draw import draw_answer
from kvist.engines.mock.engine import MockEngine, Observer
from kvist.engines.mock.ticket import Answer, Ticket

__all__ = ["Answer", "MockEngine", "Observer", "Ticket", "draw_answer"]
