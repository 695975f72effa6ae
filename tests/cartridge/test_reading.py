"""Layers read once and checked, whatever becomes of the files meanwhile; and directories that are traps."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvist.cartridge import reading
from kvist.cartridge.cartridge import Cartridge
from kvist.cartridge.manifest_file import MANIFEST, read_manifest
from kvist.cartridge.model import ModelIdentity
from kvist.cartridge.reading import Loader, open_layers
from kvist.errors import DamagedCartridge, InvalidCartridge

from .making import make_cartridge, make_layers, models


def load(directory: Path, *, verify: bool = True, after: Callable[[int], None] = lambda number: None) -> list[Tensor]:
    """A copy of all layers; ``after`` is called in the middle of the loading, after each layer."""
    copies = []
    with open_layers(directory, read_manifest(directory), verify=verify) as layers:
        for number, keys, values in layers:
            copies += [keys.clone(), values.clone()]
            after(number)
    return copies


def flat(made: Cartridge) -> list[Tensor]:
    return [half for number in range(made.num_layers) for half in made.layer(number)]


def shard(directory: Path) -> Path:
    return max(directory.glob("*.safetensors"))


@settings(max_examples=40, deadline=None)
@given(
    model=models, tokens=st.integers(1, 40), ids=st.booleans(), most=st.sampled_from([1, 999, 10**9]),
    chunk=st.sampled_from([4, 64, 1 << 20]), verify=st.booleans(),
)  # fmt: skip
def test_all_layers_bit_for_bit_in_their_order(
    model: ModelIdentity, tokens: int, ids: bool, most: int, chunk: int, verify: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    directory = tmp_path_factory.mktemp("c") / "c"
    made = make_cartridge(tokens, ids=ids, model=model)
    made.save_pretrained(directory, max_shard_size=most)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_CHUNK", chunk)
        with open_layers(directory, made.manifest, verify=verify) as layers:
            assert layers.token_ids == made.token_ids
            got = [(number, keys.clone(), values.clone()) for number, keys, values in layers]
    assert [number for number, _, _ in got] == list(range(model.num_layers))
    assert all(torch.equal(a, b) for a, b in zip([half for one in got for half in one[1:]], flat(made), strict=True))


def test_two_layers_are_in_memory_and_their_buffers_are_used_again(tmp_path: Path) -> None:
    model = dataclasses.replace(make_cartridge().manifest.model, num_layers=6)
    made = make_cartridge(20, model=model)
    made.save_pretrained(tmp_path / "c")
    places = set()
    with open_layers(tmp_path / "c", made.manifest) as layers:
        for _, keys, values in layers:
            places |= {keys.data_ptr(), values.data_ptr()}
    assert len(places) == 4


@pytest.mark.parametrize("verify", [True, False])
def test_a_file_that_is_cut_short_meanwhile(tmp_path: Path, verify: bool) -> None:
    """An error, where a mapped file would end the process."""
    make_cartridge(4000).save_pretrained(tmp_path / "c")

    def cut(number: int) -> None:
        os.truncate(shard(tmp_path / "c"), 4096)

    with pytest.raises(DamagedCartridge, match="ends at"):
        load(tmp_path / "c", verify=verify, after=cut)


def test_verifying_does_not_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it end the process if a file is cut short under it."""
    make_cartridge(4000).save_pretrained(tmp_path / "c")
    read = reading.Layers._read

    def cut(self: reading.Layers, name: str, out: Tensor) -> tuple[Tensor, str]:
        os.truncate(shard(tmp_path / "c"), 4096)
        return read(self, name, out)

    monkeypatch.setattr(reading.Layers, "_read", cut)
    with pytest.raises(DamagedCartridge):
        Cartridge.from_pretrained(tmp_path / "c")


def test_a_file_that_is_overwritten_meanwhile(tmp_path: Path) -> None:
    """In what is not read yet: found. In what is: the copy is of what was there."""
    made = make_cartridge(4000)
    made.save_pretrained(tmp_path / "c")
    layers = read_manifest(tmp_path / "c").num_layers

    def write(number: int, place: int) -> None:
        with shard(tmp_path / "c").open("r+b") as file:
            file.seek(place, os.SEEK_END)
            file.write(b"\x11" * 64)

    with pytest.raises(DamagedCartridge, match="checksum"):
        load(tmp_path / "c", after=lambda number: write(number, -64) if number == 0 else None)
    make_cartridge(4000).save_pretrained(tmp_path / "d")
    good = load(tmp_path / "d", after=lambda number: write(number, -64) if number == layers - 1 else None)
    assert all(torch.equal(a, b) for a, b in zip(good, flat(made), strict=True))


def test_a_directory_that_is_exchanged_meanwhile(tmp_path: Path) -> None:
    """After the opening: what was opened is read. Before: it has another checksum, whatever its manifest claims."""
    mine, other = make_cartridge(400), make_cartridge(400, seed=9)
    mine.save_pretrained(tmp_path / "c")
    other.save_pretrained(tmp_path / "other")

    def exchange(number: int) -> None:
        if number == 0:
            (tmp_path / "c").rename(tmp_path / "gone")
            (tmp_path / "other").rename(tmp_path / "c")

    expected = read_manifest(tmp_path / "c")
    got = load(tmp_path / "c", after=exchange)
    assert all(torch.equal(a, b) for a, b in zip(got, flat(mine), strict=True))
    with pytest.raises(DamagedCartridge, match=expected.identity):
        read_manifest(tmp_path / "c", expected.identity)
    document = json.loads((tmp_path / "c" / MANIFEST).read_text())
    (tmp_path / "c" / MANIFEST).write_text(json.dumps(document | {"checksum": expected.checksum}))
    assert read_manifest(tmp_path / "c", expected.identity).identity == expected.identity
    with pytest.raises(DamagedCartridge, match="checksum"):
        load(tmp_path / "c")


def test_numbers_that_are_none(tmp_path: Path) -> None:
    """Whoever made it computed the checksum over them."""
    layers = make_layers(20)
    made = Cartridge.create(layers, make_cartridge().manifest.model, cartridge_id="x")
    layers[2][1][7, 0, 3] = float("nan")
    bad = dataclasses.replace(made.manifest, checksum=reading.content_checksum(dict(made._tensors)))
    from kvist.cartridge.directory import write_directory

    write_directory(tmp_path / "c", bad, made._tensors, 10**9)
    with pytest.raises(DamagedCartridge, match=r"layers\.2\.values holds a NaN"):
        load(tmp_path / "c")
    assert len(load(tmp_path / "c", verify=False)) == 6


def test_a_reader_that_stops_early_closes_its_files(tmp_path: Path) -> None:
    make_cartridge(4000).save_pretrained(tmp_path / "c")
    before = len(list(Path("/proc/self/fd").iterdir()))

    def stop(number: int) -> None:
        raise KeyError(number)

    with pytest.raises(KeyError):
        load(tmp_path / "c", after=stop)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("name", [MANIFEST, "cartridge.safetensors"])
def test_a_pipe_is_refused_at_once(tmp_path: Path, name: str) -> None:
    """In a process of its own, that would wait for ever for who writes into the pipe."""
    make_cartridge().save_pretrained(tmp_path / "c")
    (tmp_path / "c" / name).unlink()
    os.mkfifo(tmp_path / "c" / name)
    code = (
        "import sys; from kvist.cartridge.cartridge import Cartridge; from kvist.errors import *\n"
        "try: Cartridge.from_pretrained(sys.argv[1])\n"
        "except (InvalidCartridge, DamagedCartridge) as error: print(error)"
    )
    opening = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "c")], stdout=subprocess.PIPE, text=True)
    try:
        said, _ = opening.communicate(timeout=120)
    finally:
        opening.kill()
        opening.wait()
    assert "no regular file" in said


def test_what_is_seen_before_anything_is_read(tmp_path: Path) -> None:
    made = make_cartridge()
    made.save_pretrained(tmp_path / "c", max_shard_size=1500)
    with pytest.raises(InvalidCartridge), open_layers(tmp_path / "c", dataclasses.replace(made.manifest, num_layers=2,
        layers=made.manifest.layers[:2])):  # fmt: skip
        pass
    shard(tmp_path / "c").unlink()
    with pytest.raises(DamagedCartridge, match="cannot read"), open_layers(tmp_path / "c", made.manifest):
        pass


def damage(file: Path, *, seconds_ago: int) -> bytes:
    good = file.read_bytes()
    file.write_bytes(good[:-8] + bytes(8))
    when = time.time() - seconds_ago
    os.utime(file, (when, when))
    return good


def test_damage_is_remembered_until_the_file_is_another(tmp_path: Path) -> None:
    made = make_cartridge()
    made.save_pretrained(tmp_path / "c")
    loader = Loader()
    good = damage(shard(tmp_path / "c"), seconds_ago=100)
    loader.check(tmp_path / "c", made.identity)
    with pytest.raises(DamagedCartridge, match="checksum"), loader.open(tmp_path / "c", made.identity) as layers:
        layers.check()
    with pytest.raises(DamagedCartridge, match="checksum"):
        loader.check(tmp_path / "c", made.identity)
    Loader().check(tmp_path / "c", made.identity)
    shard(tmp_path / "c").write_bytes(good)
    with loader.open(tmp_path / "c", made.identity) as layers:
        layers.check()


def test_what_is_not_damage_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that could not be read, a caller that failed; and a file that somebody may be writing just now."""
    made = make_cartridge()
    made.save_pretrained(tmp_path / "c")
    loader = Loader()
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(DamagedCartridge, match="output error"):
            loader.check(tmp_path / "c", made.identity)
    with pytest.raises(KeyError), loader.open(tmp_path / "c", made.identity) as layers:
        next(iter(layers))
        raise KeyError
    damage(shard(tmp_path / "c"), seconds_ago=-100)
    for _ in range(2):
        loader.check(tmp_path / "c", made.identity)
        with pytest.raises(DamagedCartridge), loader.open(tmp_path / "c", made.identity) as layers:
            layers.check()
