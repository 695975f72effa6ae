"""Five hundred hostile files: each is refused by a typed error or read right, and no code of any ever runs.

Each goes the way that a server and `kvist cartridge add` take: from a source to a directory, opened and verified, then
registered. A file that is refused leaves no directory and no entry.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from kvist.cartridge.cartridge import Cartridge
from kvist.cartridge.registry import Registry
from kvist.cartridge.sources import materialize
from kvist.cli.main import main
from kvist.errors import InvalidCartridge, KvistError

from .hostile import LAYERS, Files, Hostile, mutate, subjects
from .making import MODEL, make_layers

CASES = 500
CHUNK = 25


@pytest.fixture(scope="module")
def good() -> dict[str, tuple[Files, str]]:
    return subjects()


def register(path: Path, cache: Path, registry: Registry) -> Cartridge:
    directory = materialize(path, cache_dir=cache, model=MODEL)
    cartridge = Cartridge.from_pretrained(directory)
    cartridge.manifest.require(MODEL)
    registry.register(cartridge.manifest, str(directory))
    return cartridge


def written(case: Hostile, directory: Path) -> Path:
    directory.mkdir()
    for name, data in case.files.items():
        (directory / name).write_bytes(data)
    return directory / case.opened


def test_the_good_files_are_read(good: dict[str, tuple[Files, str]], tmp_path: Path) -> None:
    """Else refusing the mutated ones would say nothing."""
    for number, (subject, (files, opened)) in enumerate(good.items()):
        with Registry(tmp_path / f"{number}.db") as registry:
            case = Hostile(subject, "nothing", files, opened, True)
            cartridge = register(written(case, tmp_path / str(number)), tmp_path / "cache", registry)
            assert registry.count() == 1
        _same_numbers(cartridge, case)


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_hostile_files(first: int, good: dict[str, tuple[Files, str]], tmp_path: Path) -> None:
    canary, source, cache = (tmp_path / name for name in ("canary", "source", "cache"))
    with Registry(tmp_path / "registry.db") as registry:
        for seed in range(first, first + CHUNK):
            case = mutate(seed, good, canary)
            path = written(case, source)
            before = _names(source)
            try:
                cartridge = register(path, cache, registry)
            except KvistError as error:
                assert str(error), seed
                made = [one.name for one in cache.iterdir() if one.suffix != ".lock"] if cache.exists() else []
                # what was converted whole, and then did not fit, may stay
                assert not [name for name in made if name.startswith(".")], f"{seed}: {case}"
                for name in made:
                    Cartridge.from_pretrained(cache / name).close()
                assert registry.count() == 0, f"{seed}: {case}"
            except Exception as error:
                raise AssertionError(f"seed {seed}: {case}: no typed error") from error
            else:
                _same_numbers(cartridge, case)
                assert registry.unregister(cartridge.manifest.cartridge_id)
            assert not canary.exists(), f"seed {seed}: {case}: code has run"
            assert _names(source) == before, f"seed {seed}: {case}: files beside it were changed"
            assert {name for name in _names(tmp_path) if not name.startswith("registry.db")} <= {"source", "cache"}
            for directory in (source, cache):
                shutil.rmtree(directory, ignore_errors=True)


def test_hostile_cartridges_are_added_whole_or_not(good: dict[str, tuple[Files, str]], tmp_path: Path) -> None:
    """By `kvist cartridge add`, which reads manifests and headers, and leaves the bytes to the first load."""
    canary, source, database = (tmp_path / name for name in ("canary", "source", "registry.db"))
    native = {name: files for name, files in good.items() if name.startswith("native")}
    codes: Counter[int] = Counter()
    for seed in range(100):
        case = mutate(seed, native, canary)
        arguments = ["cartridge", "add", str(written(case, source)), "--registry", str(database), "--json"]
        ran = CliRunner().invoke(main, arguments)
        with Registry(database) as registry:
            if ran.exit_code:
                error = json.loads(ran.stderr)["error"]
                assert error["kind"] in ("invalid_cartridge", "damaged_cartridge"), f"seed {seed}: {case}: {error}"
                assert registry.count() == 0, f"seed {seed}: {case}"
            else:
                assert registry.count() == 1, f"seed {seed}: {case}"
                assert registry.unregister(registry.list_all()[0].cartridge_id)
        codes[ran.exit_code] += 1
        shutil.rmtree(source)
    assert not canary.exists()
    assert set(codes) == {0, InvalidCartridge.exit_code}


def test_the_mutations_are_of_all_kinds(good: dict[str, tuple[Files, str]], tmp_path: Path) -> None:
    cases = [mutate(seed, good, tmp_path / "canary") for seed in range(CASES)]
    assert {case.subject for case in cases} == set(good)
    kinds = Counter(case.mutation.split(": ")[1].split()[0] for case in cases)
    assert {"cut", "bits", "pickle", "code", "record", "an", "header"} <= set(kinds)
    assert sum("code" in case.mutation for case in cases) >= 20


def _same_numbers(cartridge: Cartridge, case: Hostile) -> None:
    """Those of the original, if they are sealed; numbers in any case."""
    layers = make_layers(32) if case.subject.startswith("native") else LAYERS
    assert cartridge.num_layers == len(layers), case
    for number, pair in enumerate(layers):
        for found, expected in zip(cartridge.layer(number), pair, strict=True):
            assert bool(torch.isfinite(found).all()), case
            assert not case.is_sealed or torch.equal(found, expected), case


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}
