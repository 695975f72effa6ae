"""Cartridges that cannot be loaded: the request fails, or is computed; never is anything else attended to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from injecting import BEGIN, SAME, config, differ, document, prefilled

QUESTION = document(9, seed=99)
DOCUMENTS = {"a": document(77, 1), "b": document(77, 2)}
RECOMPUTE = {"kv_load_failure_policy": "recompute"}

_DAMAGED = (
    BEGIN
    + """
from pathlib import Path
model, config, documents, question = arguments
llm = make_llm(model, config=config, dtype="float32")
shards = sorted(Path(config["kv_connector_extra_config"]["cartridges"][0]["path"]).glob("*.safetensors"))
good = shards[0].read_bytes()
broken = bytearray(good)
broken[-5] ^= 64
out = {"plain": ask(llm, documents["a"] + question, salt="plain")}
shards[0].write_bytes(broken)
out["damaged"] = ask_all(llm, [(question, "a", {}, None), (question, "b", {}, None), (question, "a", {}, None)])
out["left"] = left(llm)
shards[0].unlink()
out["gone"] = ask(llm, question, "a")
out["other"] = ask(llm, question, "b")
shards[0].write_bytes(good)
out["mended"] = ask(llm, question, "a")
out["shared"] = ask(llm, question, "a")
out["stats"] = worker().stats()
out["left at the end"] = left(llm)
emit(out)
"""
)


@pytest.fixture
def paths(model: Callable[..., Path], tmp_path: Path) -> dict[str, Path]:
    weights = model("tiny", dtype="float32")
    return {name: prefilled(weights, ids, tmp_path / name, name) for name, ids in DOCUMENTS.items()}


@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_a_damaged_file(
    policy: str, model: Callable[..., Path], paths: dict[str, Path], run_offline: Callable[..., Any]
) -> None:
    transfer = {"kv_load_failure_policy": policy}
    weights = str(model("tiny", dtype="float32"))
    got = run_offline(_DAMAGED, weights, config(paths, transfer=transfer), DOCUMENTS, QUESTION)
    first, other, second = got["damaged"]
    for answer in (first, second, got["gone"]):
        if policy == "fail":
            assert (answer["finish"], answer["ids"]) == ("error", [])
        else:
            assert differ(answer, got["plain"]) < SAME
    assert other["finish"] == "length"
    assert differ(got["other"], other) < SAME
    # Once it is whole again it is loaded: nothing that was computed meanwhile stands for it.
    assert got["mended"]["loaded"] == 77
    assert differ(got["mended"], got["plain"]) < SAME
    assert got["shared"]["loaded"] == 13
    assert got["stats"]["injections_failed"] >= 2
    assert got["left"] == got["left at the end"] == [0, 0, 0]


_BOOT = (
    BEGIN
    + """
model, config, options = arguments
try:
    llm = make_llm(model, config=config, **options)
except Exception as error:
    emit(str(error))
    raise SystemExit
emit("up")
"""
)


@pytest.mark.parametrize("case", ["no ids", "another model", "latent", "no room"])
def test_refused_at_boot(
    case: str, model: Callable[..., Path], run_offline: Callable[..., Any], tmp_path: Path
) -> None:
    tiny = model("tiny", dtype="float32")
    path = prefilled(tiny, DOCUMENTS["a"], tmp_path / "a", "a", has_ids=case != "no ids")
    served, options = tiny, {"dtype": "float32"}
    transfer = RECOMPUTE if case == "no ids" else {}
    said = "has no token ids"
    if case == "another model":
        served, said = model("tiny", dtype="float32", layers=2), "4"
    elif case == "latent":
        served, options, said = model("latent"), {"block_size": 16}, "latent"
    more = {}
    if case == "no room":
        more, said = {"host_bytes": 1000}, "host_bytes"
    got = run_offline(_BOOT, str(served), config({"a": path}, transfer=transfer, **more), options)
    assert said in got


def test_a_directory_that_is_gone_at_boot(
    model: Callable[..., Path], run_offline: Callable[..., Any], paths: dict[str, Path]
) -> None:
    shutil.rmtree(paths["a"])
    got = run_offline(_BOOT, str(model("tiny", dtype="float32")), config(paths), {"dtype": "float32"})
    assert str(paths["a"]) in got
