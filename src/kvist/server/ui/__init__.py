"""The page: what a repository, and the engine in front of it, look like. Server-rendered; no request leaves the server.

Knows a repository and what is shown of an engine. Must not import engines, torch or transformers.
"""

from __future__ import annotations

from kvist.server.ui.engine import EngineSide
from kvist.server.ui.page import Page
from kvist.server.ui.views import View

__all__ = ["EngineSide", "Page", "View"]
