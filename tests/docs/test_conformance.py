"""The guide to the live scenarios: its example is what an engine must write, and its table has all that there is."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from kvist.testing.scenario import LiveScenario

PAGE = (Path(__file__).parents[2] / "docs/guides/conformance.md").read_text()


def test_the_example_can_be_run() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, "conformance.md", "exec"), names)
    suites = [names[name] for name in ("TestReplay", "TestCompany", "TestRefusals")]
    assert all(issubclass(suite, LiveScenario) and not inspect.isabstract(suite) for suite in suites)


def test_the_table_has_what_an_engine_may_say() -> None:
    table = PAGE.partition("| of `LiveScenario` |")[2].partition("\n\n")[0]
    fixtures = {"model", "store", "start"}
    for name in vars(LiveScenario):
        if not name.startswith("_") and name not in fixtures and name != "cases":
            assert f"| `{name}" in table, name
