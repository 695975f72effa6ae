"""The live scenarios on the embedded engine, as `kvist serve` runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvist.testing.live import LiveServer
from kvist.testing.models import make_model, make_tokenizer
from kvist.testing.scenario import CompanyScenario, LiveScenario, RefusalScenario, ReplayScenario
from kvist.testing.worker import Worker


class Embedded(LiveScenario):
    """One request's numbers never depend on another's here, so that company asks for nothing."""

    page_size = 16
    salts = False

    @classmethod
    def serve(cls, model: Path, store: str, *, company: bool = False) -> LiveServer:
        return Worker(model, store, "--page-size", str(cls.page_size), "--pages", "4096", "--threads", "1").wait()

    @classmethod
    def make_model(cls, directory: Path, *, seed: int = 0) -> Path:
        shape: dict[str, Any] = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "dtype": "bfloat16"}
        return make_tokenizer(make_model(directory, **shape, seed=seed))


class TestReplay(Embedded, ReplayScenario):
    """See `ReplayScenario`."""


class TestCompany(Embedded, CompanyScenario):
    """See `CompanyScenario`."""

    total = 200


class TestRefusals(Embedded, RefusalScenario):
    """See `RefusalScenario`."""
