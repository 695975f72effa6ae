"""The live scenarios on a server of SGLang. What only SGLang does is in the other modules here."""

from __future__ import annotations

from pathlib import Path

import pytest
from sglang_servers import needs_server, say, serve

from kvist.testing.live import LiveServer
from kvist.testing.models import make_shape
from kvist.testing.scenario import CompanyScenario, LiveScenario, RefusalScenario, ReplayScenario

pytestmark = [needs_server, pytest.mark.timeout(1800)]


class Sglang(LiveScenario):
    """Deterministic in company and alone: without that SGLang takes no seeds.

    In float32, where no two tokens are equally likely: between those SGLang chooses by what else is in the batch.
    """

    page_size = 16
    note = staticmethod(say)

    @classmethod
    def serve(cls, model: Path, store: str, *, company: bool = False) -> LiveServer:
        return serve(model, store, page_size=cls.page_size, deterministic=True, tokens=65536)

    @classmethod
    def make_model(cls, directory: Path, *, seed: int = 0) -> Path:
        return make_shape(directory, "tiny", seed=seed)


class TestReplay(Sglang, ReplayScenario):
    """See `ReplayScenario`."""


class TestCompany(Sglang, CompanyScenario):
    """See `CompanyScenario`."""


class TestRefusals(Sglang, RefusalScenario):
    """See `RefusalScenario`."""


class TestReplayByTokens(Sglang, ReplayScenario):
    """Pages of one token, as SGLang has them where nothing else is asked for."""

    page_size = 1
