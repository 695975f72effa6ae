"""`kvist mock serve`: an OpenAI-compatible server as vLLM's, over engines that compute nothing.

Knows Starlette, mock engines and prometheus-client. Must not import torch or transformers.
"""

from __future__ import annotations

from kvist.server.mock.app import Served, create_app
from kvist.server.mock.cluster import Cluster, Ports
from kvist.server.mock.letters import letter_tokenizer

__all__ = ["Cluster", "Ports", "Served", "create_app", "letter_tokenizer"]
