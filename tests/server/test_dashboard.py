"""The Grafana dashboard: valid, and of metrics that there are."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvist.engines.hf import Engine
from kvist.repo import Repository
from kvist.server.gauges import watch_engine, watch_repository
from kvist.server.metrics import Metrics
from kvist.server.mock.metrics import Metrics as VllmMetrics
from kvist.server.tiers import Flow
from kvist.server.ui import Page

ROOT = Path(__file__).parents[2]
BOARD: dict[str, Any] = json.loads((ROOT / "docs" / "grafana" / "kvist.json").read_text())
_OF_VLLM = {"vllm:external_prefix_cache_hits", "vllm:external_prefix_cache_queries"}
"""Names that vLLM has from 0.28 to 0.32, beside those that our mock has too."""
_LATE = re.compile(r"_(?:total|bucket|count|sum)$")


def panels() -> Iterator[dict[str, Any]]:
    for panel in BOARD["panels"]:
        if panel["type"] != "row":
            yield panel


def asked() -> set[str]:
    """Names of the metrics in all queries."""
    found: set[str] = set()
    for panel in panels():
        for target in panel["targets"]:
            found |= set(re.findall(r"\b(?:vllm:|kvist_)[a-z0-9_]+", target["expr"]))
    return {_LATE.sub("", name) for name in found}


def catalogue(module: str) -> set[str]:
    """Names that a connector's metrics have, of its source: it imports vLLM, which is not here."""
    source = ast.parse((ROOT / "src" / "kvist" / "engines" / "vllm" / module).read_text())
    prefix = next(
        node.args[0].value
        for node in ast.walk(source)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "Catalogue"
        and isinstance(node.args[0], ast.Constant)
    )
    names = {
        key.value for node in ast.walk(source) if isinstance(node, ast.Dict) for key in node.keys
        if isinstance(key, ast.Constant)
    }  # fmt: skip
    return {f"{prefix}{name}" for name in names}


@pytest.fixture
def exported(engine: Engine, tmp_path: Path) -> set[str]:
    """Names that our code exports."""
    metrics = Metrics()
    found = catalogue("metrics.py") | catalogue("cartridges/metrics.py") | _OF_VLLM
    tiers = [f"{(tmp_path / 'tier').as_uri()}?max_bytes=1MB"]
    with Repository.open(str(tmp_path / "store"), create=True, tiers=tiers) as repo:
        page = Page(repo, flow=Flow())
        page.space.get()
        watch_repository(metrics, repo, page.space)
        watch_engine(metrics, engine)
        found |= {metric.name for metric in metrics.registry.collect()}
    text = VllmMetrics("model").text().decode()
    return found | {family.name for family in text_string_to_metric_families(text)}


def test_every_metric_is_exported(exported: set[str]) -> None:
    assert asked() - exported == set()


def test_it_shows_both_sides() -> None:
    names = asked()
    assert sum(name.startswith("vllm:") for name in names) > 10
    assert sum(name.startswith("kvist_") for name in names) > 20


def test_ids_are_unique_and_panels_do_not_overlap() -> None:
    ids = Counter(panel["id"] for panel in BOARD["panels"])
    assert set(ids.values()) == {1}
    taken: Counter[tuple[int, int]] = Counter()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                taken[x, y] += 1
    assert set(taken.values()) == {1}


def test_every_panel_has_a_unit_and_says_what_it_shows() -> None:
    for panel in panels():
        assert panel["description"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")")
            assert 'instance=~"$instance"' in target["expr"]
