"""The live scenarios on vLLM. What only vLLM does is in the other modules here."""

from __future__ import annotations

from pathlib import Path

from vllm_servers import PYTHON, hash_seed, say, watched

from kvist.testing.live import LiveServer
from kvist.testing.scenario import CompanyScenario, LiveScenario, RefusalScenario, ReplayScenario
from kvist.testing.vllm import VllmServer


class Vllm(LiveScenario):
    """In company: under settings that make a request's numbers independent of what else is in the batch."""

    note = staticmethod(say)

    @classmethod
    def serve(cls, model: Path, store: str, *, company: bool = False) -> LiveServer:
        options = "--max-model-len", "8192"
        return watched(
            VllmServer(model, store, *options, python=PYTHON, deterministic=company, env=hash_seed(), dtype="bfloat16")
        )


class TestReplay(Vllm, ReplayScenario):
    """See `ReplayScenario`."""


class TestCompany(Vllm, CompanyScenario):
    """See `CompanyScenario`."""


class TestRefusals(Vllm, RefusalScenario):
    """See `RefusalScenario`."""
