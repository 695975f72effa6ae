"""`kvist cartridge import`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cartridge.checkpoints import FROZEN, TOKENS, fixed, hazy, knlp, sample, sidecar, trainable
from cartridge.making import MODEL
from kvist.cartridge.cartridge import Cartridge
from kvist.hashing.weights import revision

from .conftest import Kvist


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The configuration and the weights, such as they are, of the model that samples are for."""
    config = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3, "rope_theta": 10000.0}
    (directory := tmp_path / "models" / "tiny").mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    (directory / "model.safetensors").write_bytes(b"weights")
    return directory


def test_import(kvist: Kvist, model: Path, tmp_path: Path) -> None:
    path, out = hazy(tmp_path, sample()), tmp_path / "out"
    said = ("--model", str(model), "--id", "doc", "--label", "ward=3", "--license", "mit", "-o", str(out))
    shown = kvist.ok("cartridge", "import", str(path), *said, "--json").json
    with Cartridge.from_pretrained(out) as made:
        manifest = made.manifest
        assert torch.equal(made.layer(1)[0], sample()[1][0])
    assert shown == {
        "cartridge_id": "doc",
        "identity": manifest.identity,
        "directory": str(out),
        "source_format": "trainable_cache",
        "model_id": "tiny",
        "tokens": TOKENS,
        "frozen_tokens": FROZEN,
        "bytes": 3 * 2 * TOKENS * 2 * 8 * 2,
    }
    assert (manifest.labels, manifest.license) == ({"ward": "3"}, "mit")
    assert (manifest.model_revision, manifest.rope) == (revision(model), MODEL.rope)


def test_import_of_a_directory_by_what_it_says(kvist: Kvist, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    ran = kvist.ok("cartridge", "import", str(knlp(tmp_path / "source", sample())), "-o", str(tmp_path / "out"))
    assert "32 tokens" in ran.out
    assert "past_key_values" in ran.out
    with Cartridge.from_pretrained(tmp_path / "out") as made:
        assert (made.manifest.cartridge_id, made.manifest.model_id, made.token_ids is None) == (
            "out",
            "org/tiny",
            False,
        )


def test_import_with_a_manifest(kvist: Kvist, tmp_path: Path) -> None:
    path = fixed(tmp_path, sample())
    (tmp_path / "told.json").write_text(json.dumps(sidecar(path, sample())))
    said = ("--manifest", str(tmp_path / "told.json"), "-o", str(tmp_path / "out"), "-q")
    assert kvist.ok("cartridge", "import", str(path), *said).out == "patient_04\n"


def test_import_converts_on_request(kvist: Kvist, model: Path, tmp_path: Path) -> None:
    tree = {name: [one.float() for one in tensors] for name, tensors in trainable(sample()).items()}
    torch.save(tree, path := tmp_path / "wide.pt")
    said = ("cartridge", "import", str(path), "--model", str(model), "-o", str(tmp_path / "out"))
    ran = kvist(*said, "--json")
    assert (ran.code, ran.error["kind"], ran.error["hint"]) == (12, "layout_mismatch", "--dtype bfloat16 converts it")
    kvist.ok(*said, "--dtype", "bfloat16")
    with Cartridge.from_pretrained(tmp_path / "out") as made:
        assert torch.equal(made.layer(2)[1], sample()[2][1])


def test_import_renames_the_model(kvist: Kvist, model: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    path = knlp(tmp_path / "source", sample(), model="Qwen/Qwen3-8B")
    said = ("cartridge", "import", str(path), "--model", str(model), "-o", str(tmp_path / "out"))
    assert "--model-id 'Qwen/Qwen3-8B'" in str(kvist(*said, "--json").error["hint"])
    assert kvist.ok(*said, "--model-id", "Qwen/Qwen3-8B", "--json").json["model_id"] == "Qwen/Qwen3-8B"
    assert kvist("cartridge", "import", str(path), "--model-id", "a", "-o", str(tmp_path / "b")).code == 2


@pytest.mark.parametrize("kind", ["unsafe", "broken", "taken", "no model"])
def test_import_refuses_and_leaves_nothing(kind: str, kvist: Kvist, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = hazy(tmp_path, sample())
    said = ["cartridge", "import", str(path), "--model", str(model), "-o", str(out), "--json"]
    match kind:
        case "unsafe":
            torch.save(torch.nn.Linear(2, 2), path)
            expected = "unsafe_checkpoint"
        case "broken":
            path.write_bytes(path.read_bytes()[:500])
            expected = "invalid_cartridge"
        case "taken":
            out.write_text("")
            said[6] = str(tmp_path)
            expected = "already_exists"
        case _:
            del said[3:5]
            expected = "invalid_input"
    before = {one.name for one in tmp_path.iterdir()}
    assert kvist(*said).error["kind"] == expected
    assert {one.name for one in tmp_path.iterdir()} == before
