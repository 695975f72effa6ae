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


_CUT_SHORT = (
    BEGIN
    + """
import os
from pathlib import Path
from kvist.cartridge.reading import Layers
model, config, question = arguments
llm = make_llm(model, config=config, dtype="float32")
shard = next(Path(config["kv_connector_extra_config"]["cartridges"][0]["path"]).glob("*.safetensors"))
good, read = shard.read_bytes(), Layers._read
ask(llm, question)  # so that the front end has read the token ids
def cut(*given):
    os.truncate(shard, 4096)
    return read(*given)
Layers._read = cut
out = {"cut": ask(llm, question, "a"), "left": left(llm), "stats": worker().stats()}
Layers._read = read
shard.write_bytes(good)
out["mended"] = ask(llm, question, "a")
emit(out)
"""
)


def test_a_file_that_is_cut_short_while_it_is_loaded(
    model: Callable[..., Path], paths: dict[str, Path], run_offline: Callable[..., Any]
) -> None:
    """The request fails, and nothing else: a mapped file would take the engine with it."""
    got = run_offline(_CUT_SHORT, str(model("tiny", dtype="float32")), config(paths), QUESTION)
    assert (got["cut"]["finish"], got["cut"]["ids"], got["left"]) == ("error", [], [0, 0, 0])
    stats = got["stats"]
    assert (stats["failures"], stats["loads"], stats["resident_bytes"], stats["reserved_bytes"]) == (1, 0, 0, 0)
    assert (stats["injections"], stats["pages_injected"]) == (0, 0)
    assert got["mended"]["loaded"] == 77


_IDS = (
    BEGIN
    + """
import json, struct
from pathlib import Path
from kvist.cartridge.manifest_file import read_manifest
from kvist.cartridge.registry import Registry
model, config, registry, paths, question, document = arguments
llm = make_llm(model, config=config, dtype="float32")
out = {"plain": ask(llm, document + question, salt="plain")}

def put(path, token):
    (shard,) = Path(path).glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    start, _ = json.loads(data[8 : 8 + size])["token_ids"]["data_offsets"]
    struct.pack_into("<q", data, 8 + size + start, token)
    shard.write_bytes(data)

def refused(name):
    params = sampling(name)
    params.repetition_penalty = 1.2  # of all ids, those of the document too
    try:
        return shown(llm.generate({"prompt_token_ids": question}, params, use_tqdm=False)[0])
    except Exception as error:
        return str(error)

with Registry(registry) as known:
    for path in paths.values():
        known.register(read_manifest(Path(path)), path)
for number, token in enumerate((7, 5_000_000)):
    put(paths["b"], token)
    out[f"damaged {number}"] = refused("b")
out["alien"] = refused("alien")
out["good"] = ask(llm, question, "a")
out["left"] = left(llm)
emit(out)
"""
)


def test_token_ids_that_are_computed_from(
    model: Callable[..., Path], paths: dict[str, Path], run_offline: Callable[..., Any], tmp_path: Path
) -> None:
    """Damaged ones, and those of another tokenizer: refused before anything is computed, and the engine lives."""
    weights = model("tiny", dtype="float32")
    ids = DOCUMENTS["a"]
    alien = prefilled(weights, ids, tmp_path / "alien", "alien", told=[5_000_000, *ids[1:]])
    registry = str(tmp_path / "registry.db")
    serving = config({}, transfer=RECOMPUTE, registry=registry)
    del serving["kv_connector_extra_config"]["cartridges"]
    found = {name: str(path) for name, path in {**paths, "alien": alien}.items()}
    got = run_offline(_IDS, str(weights), serving, registry, found, QUESTION, ids)
    assert "checksum" in got["damaged 0"]
    assert isinstance(got["damaged 1"], str)
    assert "the token id 5000000" in got["alien"]
    assert differ(got["good"], got["plain"]) < SAME
    assert got["left"] == [0, 0, 0]


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
