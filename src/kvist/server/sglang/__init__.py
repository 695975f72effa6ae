"""kvist inside SGLang's API process: the snapshot routes, and requests that go on from a snapshot.

Knows SGLang's FastAPI application and its tokenizer manager by what they can do. Must not import sglang itself; what
does is `kvist.engines.sglang`.
"""

from __future__ import annotations

from kvist.server.sglang.plugin import register

__all__ = ["register"]
