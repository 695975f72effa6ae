"""kvist inside vLLM's API server: the snapshot routes, and requests that go on from a snapshot.

Knows ASGI, a repository, and vLLM's engine client by what it can do. Must not import vllm.
"""

from __future__ import annotations

from kvist.server.vllm.plugin import EndpointPlugin, KvistMiddleware, endpoint_plugin

__all__ = ["EndpointPlugin", "KvistMiddleware", "endpoint_plugin"]
