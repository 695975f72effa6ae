"""Snapshots converted from the embedded engine to a server of SGLang and back; and from vLLM, where it is there too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sglang_servers import needs_server, say, serve

from kvist.repo import Repository
from kvist.testing.live import LiveServer
from kvist.testing.scenario import ConvertScenario
from kvist.testing.scenario.converted import LAYOUT, kvist, misplace
from kvist.testing.scenario.requests import GREEDY, Case, interrupt, prompt
from kvist.testing.vllm import VllmServer

pytestmark = [needs_server, pytest.mark.timeout(1800)]


class Sglang(ConvertScenario):
    page_size = 1
    note = staticmethod(say)

    @classmethod
    def serve(cls, model: Path, store: str, *, company: bool = False) -> LiveServer:
        return serve(model, store, page_size=cls.page_size, deterministic=True, tokens=65536)


class TestByTokens(Sglang):
    """Pages of one token."""

    @pytest.mark.skipif("KVIST_VLLM_PYTHON" not in os.environ, reason="vllm is not installed (see KVIST_VLLM_PYTHON)")
    def test_from_vllm(self, server: LiveServer, model: Path, store: str) -> None:
        """A request that ran on vLLM, with its keys transposed in blocks of 32, goes on here."""
        options = "--max-model-len", "8192"
        with VllmServer(model, store, *options, python=os.environ["KVIST_VLLM_PYTHON"], dtype="float32") as vllm:
            past = interrupt(vllm, Case("from-vllm", prompt(300, 7), GREEDY))
        cid = kvist(store, "convert", past.cid, "--to-layout", "-", "-q", stdin=server.http.get(LAYOUT).text)
        with Repository.open(store) as repo:
            wrong = misplace(repo, cid, "wrong-from-vllm")
        self.require_near(server, past.token_ids, (cid, wrong, past.sequence), "from vLLM")


class TestWidePages(Sglang):
    """Wider ones than the embedded engine's, of keys that are normalised by head."""

    page_size = 64
    family = "qwen3"
