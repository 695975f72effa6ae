"""Cartridges brought into host memory: what is used is what was verified, and what fails changes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvist.cartridge.library import Entry, Library
from kvist.cartridge.manifest_file import read_manifest
from kvist.cartridge.reading import Layers
from kvist.engines.hf import Engine
from kvist.errors import DamagedCartridge

from .cartridges import noise
from .driving import params, prompt

Load = Callable[..., Engine]
QUESTION = prompt(9, seed=5)


def ask(engine: Engine, cartridge: str) -> None:
    engine.submit(QUESTION, params(2), cartridge=cartridge).result()


@pytest.mark.parametrize("how", ["cut", "overwritten", "exchanged"])
def test_files_that_change_while_they_are_loaded(
    how: str, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every check that comes before: the bytes that are used are those that were verified, or none are."""
    engine = load()
    for seed, name in enumerate(("c", "other")):
        noise(engine, 400, seed=seed, name="c").save_pretrained(tmp_path / name)
    manifest = read_manifest(tmp_path / "c")
    engine.cartridges.library = Library([Entry("c", tmp_path / "c", manifest)])
    shard = tmp_path / "c" / "cartridge.safetensors"
    good, read = shard.read_bytes(), Layers._read

    def change(layers: Layers, name: str, out: torch.Tensor) -> tuple[torch.Tensor, str]:
        if how == "cut":
            os.truncate(shard, 4096)
        elif how == "overwritten":
            shard.write_bytes(good[:-64] + bytes(64))
        else:
            shard.write_bytes((tmp_path / "other" / "cartridge.safetensors").read_bytes())
        return read(layers, name, out)

    with monkeypatch.context() as patch:
        patch.setattr(Layers, "_read", change)
        with pytest.raises(DamagedCartridge):
            engine.submit(QUESTION, params(2), cartridge="c")
    metrics = engine.cartridges.metrics()
    assert (metrics.failures, metrics.loads, metrics.resident_bytes, metrics.reserved_bytes) == (1, 0, 0, 0)
    shard.write_bytes(good)
    ask(engine, "c")


def test_a_missing_file_is_seen_before_others_go_for_it(load: Load, tmp_path: Path) -> None:
    engine = load(cartridge_bytes=2 * 2 * load(start=False).layout.page_bytes)
    for seed, name in enumerate(("good", "cut")):
        noise(engine, 20, seed=seed, name=name).save_pretrained(tmp_path / name)
    manifests = {name: read_manifest(tmp_path / name) for name in ("good", "cut")}
    engine.cartridges.library = Library([Entry(name, tmp_path / name, one) for name, one in manifests.items()])
    ask(engine, "good")
    os.truncate(tmp_path / "cut" / "cartridge.safetensors", 4096)
    with pytest.raises(DamagedCartridge):
        engine.submit(QUESTION, params(2), cartridge="cut")
    assert engine.cartridges.metrics().evictions == 0


def test_who_asks_for_a_damaged_one_again_and_again_does_not_empty_the_memory(load: Load, tmp_path: Path) -> None:
    """What is damaged shows at the end of a load, for which others had to go: once."""
    engine = load(cartridge_bytes=2 * 2 * load(start=False).layout.page_bytes)
    for seed, name in enumerate(("good", "bad")):
        noise(engine, 20, seed=seed, name=name).save_pretrained(tmp_path / name)
    manifests = {name: read_manifest(tmp_path / name) for name in ("good", "bad")}
    engine.cartridges.library = Library([Entry(name, tmp_path / name, one) for name, one in manifests.items()])
    shard = tmp_path / "bad" / "cartridge.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[:-8] + bytes(8))
    os.utime(shard, (10**9, 10**9))
    for _ in range(5):
        ask(engine, "good")
        with pytest.raises(DamagedCartridge, match="checksum"):
            engine.submit(QUESTION, params(2), cartridge="bad")
    assert engine.cartridges.metrics().evictions == 1
    shard.write_bytes(good)
    ask(engine, "bad")


@pytest.mark.parametrize("verify", [True, False])
def test_verification_is_the_operators_choice(verify: bool, load: Load, tmp_path: Path) -> None:
    engine = load()
    noise(engine, 20, seed=0, name="c").save_pretrained(tmp_path / "c")
    library = Library([Entry("c", tmp_path / "c", read_manifest(tmp_path / "c"))])
    engine.cartridges.use(library, model=library.get("c").manifest.model, host_bytes=1 << 26, verify=verify)
    shard = tmp_path / "c" / "cartridge.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8] + bytes(8))
    if not verify:
        ask(engine, "c")
        return
    with pytest.raises(DamagedCartridge, match="checksum"):
        engine.submit(QUESTION, params(2), cartridge="c")
