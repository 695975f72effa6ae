"""The scenarios that every live engine must pass: serve, snapshot live, SIGKILL, serve, checkout, go on, fork, refuse.

They talk HTTP to a server and know kvist's routes; the engine is a black box. An engine contributes how it is started:

    class MyEngine(LiveScenario):
        page_size = 16

        @classmethod
        def serve(cls, model: Path, store: str, *, company: bool = False) -> LiveServer:
            return MyServer(model, store, deterministic=company).wait()

    class TestReplay(MyEngine, ReplayScenario): ...
    class TestCompany(MyEngine, CompanyScenario): ...
    class TestRefusals(MyEngine, RefusalScenario): ...

Each class ends its servers before the next begins. ``pytest.register_assert_rewrite("kvist.testing.scenario")`` in a
conftest lets failures show both values.
"""

from __future__ import annotations

from kvist.testing.scenario.base import LiveScenario, Start
from kvist.testing.scenario.company import CompanyScenario
from kvist.testing.scenario.converted import ConvertScenario
from kvist.testing.scenario.refusals import RefusalScenario
from kvist.testing.scenario.replay import ReplayScenario

__all__ = ["CompanyScenario", "ConvertScenario", "LiveScenario", "RefusalScenario", "ReplayScenario", "Start"]
