"""Cartridges on two tensor-parallel ranks: what `kvist cartridge validate` says, and ranks that do not agree."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from injecting import BEGIN, SAME, config, differ, document, prefilled

from kvist.testing.vllm import VllmServer

DOCUMENTS = {"a": document(77, 1), "b": document(64, 2)}
QUESTION = document(9, seed=99)
OTHERS = [document(40, seed) for seed in range(6)]


@pytest.fixture(scope="module")
def paths(model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("cartridges")
    return {name: prefilled(model("tiny", dtype="float32"), ids, root / name, name) for name, ids in DOCUMENTS.items()}


def test_validate_on_two_ranks(
    paths: dict[str, Path],
    model: Callable[..., Path],
    start: Callable[..., VllmServer],
    note: Callable[[str], None],
) -> None:
    """All tiers, those of ranks among them."""
    options = ("--tensor-parallel-size", "2")
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    server = start(model("tiny", dtype="float32"), None, *options, config=config(paths), dtype="float32", env=env)
    command = [sys.executable, "-m", "kvist", "cartridge", "validate", "--url", server.url, "--json"]
    command += [part for name, path in paths.items() for part in ("--cartridge", f"{name}={path}")]
    ran = subprocess.run(command, capture_output=True, text=True)
    ranks = server.get("/v1/kvist/stats")["ranks"]
    server.stop()
    assert ran.returncode == 0, ran.stdout + ran.stderr
    tiers = json.loads(ran.stdout)["tiers"]
    assert {tier["tier"]: tier["outcome"] for tier in tiers} == dict.fromkeys(
        ["0", "0.5", "1", "1b", "2", "3", "4", "5", "6"], "passed"
    )
    assert tiers[-1]["detail"].startswith("2 ranks: 2 cartridges, first tokens equal")
    assert ranks[0]["injections"] == ranks[1]["injections"] > 0
    for tier in tiers:
        note(f"cartridge validate on two ranks, tier {tier['tier']}: {tier['outcome']}: {tier['detail']}")


_ONE_FAILS = (
    BEGIN
    + """
model, config, documents, question, others, broken = arguments
llm = make_llm(model, config=config, dtype="float32", tensor_parallel_size=2, distributed_executor_backend="mp",
               num_gpu_blocks_override=16, max_model_len=256)

def side_of(worker):
    from vllm.distributed.kv_transfer import get_kv_transfer_group
    return worker.rank, get_kv_transfer_group().worker

def damage(worker, broken):
    import time
    from kvist.errors import DamagedCartridge
    rank, side = side_of(worker)
    if rank != broken:  # still writes when the other one has told of its failure
        inject = side._inject
        def late(*given):
            time.sleep(1)
            return inject(*given)
        side._inject = late
        return
    class Damaged:
        check = side._loader.check
        def open(self, *given):
            raise DamagedCartridge("of this rank")
    side._sound, side._loader = side._loader, Damaged()

def mend(worker, broken):
    rank, side = side_of(worker)
    if rank == broken:
        side._loader = side._sound

def on_ranks(act, *given):
    return core(llm).model_executor.collective_rpc(act, args=given)

out = {"plain": ask(llm, documents["a"] + question, salt="plain")}
out["alone"] = [ask(llm, ids, salt="alone") for ids in others]
on_ranks(damage, broken)
asked = [(question, "a", {}, None), *((ids, None, {}, "beside") for ids in others), (question[::-1], "a", {}, None)]
out["first"], *out["beside"], out["second"] = ask_all(llm, asked)
out["left"] = left(llm)
on_ranks(mend, broken)
out["mended"] = ask(llm, question, "a")
out["other"] = ask(llm, question, "b")
out["left at the end"] = left(llm)
out["stats"] = llm.collective_rpc("kvist", args=("cartridge_stats", {}))[0]["ranks"]
out["reversed"] = ask(llm, documents["a"] + question[::-1], salt="plain")
out["plain of b"] = ask(llm, documents["b"] + question, salt="plain")
emit(out)
"""
)


@pytest.mark.parametrize("policy", ["fail", "recompute"])
@pytest.mark.parametrize("broken", [0, 1])
def test_one_rank_cannot_load(
    broken: int, policy: str, paths: dict[str, Path], model: Callable[..., Path], run_offline: Callable[..., Any]
) -> None:
    """Its requests fail, or are computed; the other rank's late pages reach nobody else's blocks; nothing stays."""
    given = config(paths, transfer={"kv_load_failure_policy": policy})
    weights = str(model("tiny", dtype="float32"))
    got = run_offline(_ONE_FAILS, weights, given, DOCUMENTS, QUESTION, OTHERS, broken)
    for answer, expected in ((got["first"], got["plain"]), (got["second"], got["reversed"])):
        if policy == "fail":
            assert (answer["finish"], answer["ids"]) == ("error", [])
        else:
            assert differ(answer, expected) < SAME
    for answer, alone in zip(got["beside"], got["alone"], strict=True):
        assert differ(answer, alone) < SAME
    assert got["mended"]["loaded"] == 77
    assert differ(got["mended"], got["plain"]) < SAME
    assert differ(got["other"], got["plain of b"]) < SAME
    assert got["left"] == got["left at the end"] == [0, 0, 0]
    whole, damaged = got["stats"][1 - broken], got["stats"][broken]
    assert (whole["injections_failed"], whole["injections"]) == (0, 4)
    assert (damaged["injections_failed"], damaged["injections"]) == (2, 2)
    assert whole["reserved_bytes"] == damaged["reserved_bytes"] == 0
    assert whole["resident_bytes"] == damaged["resident_bytes"] > 0
