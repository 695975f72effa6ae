"""The HTTP server: an OpenAI-compatible API, and snapshot, fork and checkout of the engine behind it.

Knows Starlette, an engine object and a repository. Must not import torch or transformers.
"""

from __future__ import annotations

from kvist.server.app import create_app
from kvist.server.run import Server, bind, serve, url_of
from kvist.server.tokenizer import Tokenizer

__all__ = ["Server", "Tokenizer", "bind", "create_app", "serve", "url_of"]
