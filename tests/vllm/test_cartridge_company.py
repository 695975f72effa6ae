"""Cartridges beside what else there may be: snapshots' connector, tensor-parallel ranks, vLLM's metrics."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from injecting import BEGIN, SAME, config, differ, document, prefilled

from kvist.testing.vllm import transfer_config

QUESTION = document(40, seed=99)
DOCUMENT = document(77, 1)

_BESIDE = (
    BEGIN
    + """
import time
model, config, document, question, at_least = arguments
llm = make_llm(model, config=config, dtype="float32")
out = {"placed": ask(llm, question, "a"), "again": ask(llm, question[::-1], "a", tokens=70)}
stats = lambda: worker("KvistConnector").stats()
def settled(least=0):
    # what is saved is saved beside the steps
    until = time.monotonic() + 60
    while (now := stats()["blocks_saved"]) < least and time.monotonic() < until:
        time.sleep(0.05)
    return now
out["saved of cartridges"] = settled()
out["plain"] = ask(llm, document + question, salt="plain")
ask(llm, question[::-1], tokens=2)  # a step in which the last blocks are sent
out["saved"] = settled(at_least)
out["loads"] = stats()["loads"]
out["once more"] = ask(llm, question, "a", salt="another client's")
out["loads then"] = stats()["loads"]
out["left"] = left(llm)
emit(out)
"""
)


@pytest.fixture(scope="module")
def path(model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prefilled(model("tiny", dtype="float32"), DOCUMENT, tmp_path_factory.mktemp("cartridges") / "a", "a")


@pytest.mark.parametrize("first", ["KvistConnector", "CartridgeConnector"])
def test_beside_the_connector_of_snapshots(
    first: str, store: str, path: Path, model: Callable[..., Path], run_offline: Callable[..., Any]
) -> None:
    """Which leaves requests with a cartridge alone: their blocks are neither stored nor looked for in the store."""
    children = [transfer_config(f"{store}-{first}", {"mode": "write_through"}), config({"a": path})]
    children = children if first == "KvistConnector" else children[::-1]
    both = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": children},
    }
    got = run_offline(_BESIDE, str(model("tiny", dtype="float32")), both, DOCUMENT, QUESTION, 3)
    assert [got[name]["loaded"] for name in ("placed", "again", "once more")] == [77, 13, 77]
    assert got["saved of cartridges"] == 0
    assert got["saved"] >= 3
    assert got["loads"] == got["loads then"]
    for name in ("placed", "once more"):
        assert differ(got[name], got["plain"]) < SAME
    assert got["left"][:2] == [0, 0]


_RANKS = (
    BEGIN
    + """
import prometheus_client
model, config, document, question = arguments
llm = make_llm(model, config=config, dtype="float32", tensor_parallel_size=2, distributed_executor_backend="mp",
               disable_log_stats=False)
out = {"plain": ask(llm, document + question, salt="plain"), "placed": ask(llm, question, "a")}
out["shared"] = ask(llm, question, "a")
out["stats"] = llm.collective_rpc("kvist", args=("cartridge_stats", {}))[0]["ranks"]
out["metrics"] = prometheus_client.generate_latest().decode()
out["left"] = left(llm)
emit(out)
"""
)


def test_two_ranks(path: Path, model: Callable[..., Path], run_offline: Callable[..., Any]) -> None:
    """Each holds and injects its own heads; vLLM's metrics add them up."""
    got = run_offline(_RANKS, str(model("tiny", dtype="float32")), config({"a": path}), DOCUMENT, QUESTION[:9])
    assert [got[name]["loaded"] for name in ("placed", "shared")] == [77, 13]
    for name in ("placed", "shared"):
        assert differ(got[name], got["plain"]) < SAME
    page = 32 * 2 * 2 * 32 * 4 * 4  # tokens, heads a rank, K and V, head size, bytes, layers
    for rank in got["stats"]:
        assert (rank["injections"], rank["resident_bytes"]) == (2, 3 * page)
    assert len(got["stats"]) == 2
    told = dict(re.findall(r"^vllm:kvist_cartridge_(\w+?)(?:_total)?\{[^}]*\} (\S+)$", got["metrics"], re.MULTILINE))
    assert float(told["injections"]) == 2 * 2
    assert float(told["bytes_injected"]) == 2 * (3 + 1) * page
    assert float(told["resident"]) == 1
    assert float(told["resident_bytes"]) == 3 * page
    assert got["left"] == [0, 0, 0]
