"""A checkpoint becomes a cartridge: what the file, its manifest, the model and the caller say, put together."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvist.cartridge.cartridge import Cartridge
from kvist.cartridge.formats import Imported, import_checkpoint, importing
from kvist.errors import DamagedCartridge, InvalidCartridge, InvalidInput, LayoutMismatch, NotFound

from .checkpoints import (
    FROZEN,
    SINKS,
    TOKENS,
    WRITERS,
    hazy,
    knlp,
    legacy_cache,
    peft,
    reasoncache,
    sample,
    sidecar,
)
from .making import MODEL


@pytest.mark.parametrize("name", WRITERS)
def test_every_family_becomes_the_same_cartridge(name: str, tmp_path: Path) -> None:
    """Down to the identity: what is served does not depend on who wrote the file."""
    layers = sample()
    made = import_checkpoint(WRITERS[name](tmp_path, layers), MODEL, cartridge_id="doc")
    made.save_pretrained(tmp_path / "out")
    with Cartridge.from_pretrained(tmp_path / "out") as opened:
        assert all(torch.equal(a, b) for n in range(3) for a, b in zip(opened.layer(n), layers[n], strict=True))
        assert opened.manifest.num_frozen_tokens == (FROZEN if name in SINKS else 0)
        assert (opened.token_ids is not None) == (name == "knlp")
        if name != "knlp":  # it holds token ids too
            plain = Cartridge.create(layers, MODEL, cartridge_id="other")
            assert opened.identity == plain.identity


def test_the_provenance_names_the_file(tmp_path: Path) -> None:
    path = hazy(tmp_path, sample())
    origin = import_checkpoint(path, MODEL, cartridge_id="doc").manifest.provenance["from"]
    assert (origin["file"], origin["size"], origin["format"], origin["model"]) == (
        path.name,
        path.stat().st_size,
        "trainable_cache",
        None,
    )


# -- sidecar manifests -------------------------------------------------------------------------------------------


def with_sidecar(path: Path, name: str = "", **changes: Any) -> Path:
    beside = path.with_name(name or path.name + ".json")
    beside.write_text(json.dumps(sidecar(path, sample(), **changes)))
    return beside


@pytest.mark.parametrize("name", ["cache-step100.pt.json", "cache-step100.json", "elsewhere.json"])
def test_an_original_manifest_is_taken_over(name: str, tmp_path: Path) -> None:
    path = hazy(tmp_path, sample())
    beside = with_sidecar(path, name, unknown_future_field=1)
    manifest_path = beside if name == "elsewhere.json" else None
    manifest = import_checkpoint(path, MODEL, manifest_path=manifest_path, labels={"more": "1"}).manifest
    assert manifest.cartridge_id == "patient_04"
    assert manifest.labels == {"doc_type": "medical_record", "more": "1"}
    assert (manifest.training_steps, manifest.source_document) == (2694, "patient_04 medical record")
    assert (manifest.num_tokens_raw, manifest.num_tokens_aligned, manifest.num_blocks) == (TOKENS, 32, 2)
    assert manifest.provenance["from"]["model"] == "org/tiny"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 4}, "num_layers: the manifest says 4, the checkpoint has 3"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"head_dim": 9}, "head_dim"),
        ({"num_frozen_tokens": 3}, "num_frozen_tokens: the manifest says 3, the checkpoint has 2"),
        ({"has_frozen_prefix": False, "num_frozen_tokens": 0}, "has_frozen_prefix"),
        ({"num_tokens_raw": 48, "num_tokens_aligned": 48, "num_blocks": 3}, "num_tokens_raw"),
        ({"dtype": "float16"}, "dtype: the manifest says float16, the checkpoint has bfloat16"),
        ({"file_size_bytes": 5}, "file_size_bytes"),
        ({"resource_kind": "reasoncache"}, "resource_kind"),
        ({"num_blocks": 7}, "num_blocks"),
        ({"num_layers": -1}, "num_layers"),
        ({"num_layers": "3"}, "num_layers"),
        ({"labels": {"a": 1}}, "label"),
    ],
)
def test_a_manifest_must_be_of_the_file(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = hazy(tmp_path, sample())
    with_sidecar(path, **changes)
    with pytest.raises(InvalidCartridge, match=message):
        import_checkpoint(path, MODEL)


def test_what_a_manifest_leaves_out_is_not_compared(tmp_path: Path) -> None:
    path = hazy(tmp_path, sample())
    whole = sidecar(path, sample())
    required = list(whole)[: list(whole).index("num_frozen_tokens")]
    path.with_name("cache-step100.pt.json").write_text(json.dumps({name: whole[name] for name in required}))
    manifest = import_checkpoint(path, MODEL).manifest
    assert (manifest.cartridge_id, manifest.num_frozen_tokens, manifest.resource_kind) == ("patient_04", 2, "cartridge")


def test_a_kind_that_a_manifest_leaves_out_is_the_files(tmp_path: Path) -> None:
    path = reasoncache(tmp_path, sample())
    said = sidecar(path, sample(), has_frozen_prefix=False, num_frozen_tokens=0)
    del said["resource_kind"]
    path.with_name("reason.pt.json").write_text(json.dumps(said))
    assert import_checkpoint(path, MODEL).manifest.resource_kind == "reasoncache"


@pytest.mark.parametrize("text", ["[1, 2]", "{", "", '{"some": "config"}', "\0", "[" * 100_000])
def test_an_unrelated_file_beside_is_no_manifest(text: str, tmp_path: Path) -> None:
    path = hazy(tmp_path, sample())
    path.with_suffix(".json").write_text(text)
    assert import_checkpoint(path, MODEL, cartridge_id="doc").manifest.labels == {}
    path.with_name(path.name + ".json").write_text(text)
    with pytest.raises(InvalidCartridge, match=r"cache-step100\.pt\.json"):
        import_checkpoint(path, MODEL, cartridge_id="doc")


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hazy(tmp_path, sample())
    original = importing.read_checkpoint

    def read(*words: Any, **said: Any) -> Imported:
        imported = original(*words, **said)
        hazy(tmp_path, sample(seed=1))
        return imported

    monkeypatch.setattr(importing, "read_checkpoint", read)
    with pytest.raises(InvalidCartridge, match="has changed while it was read"):
        import_checkpoint(path, MODEL, cartridge_id="doc")


def test_a_checksum_must_be_that_of_the_file(tmp_path: Path) -> None:
    path = hazy(tmp_path, sample())
    with_sidecar(path)
    hazy(tmp_path, sample(seed=1))
    with pytest.raises(DamagedCartridge, match="SHA-256"):
        import_checkpoint(path, MODEL)


def test_fields_that_the_first_writers_left_empty(tmp_path: Path) -> None:
    path = hazy(tmp_path, sample())
    with_sidecar(path, checksum="", file_size_bytes=0, dtype="unknown", labels={})
    assert import_checkpoint(path, MODEL).manifest.cartridge_id == "patient_04"


def test_an_id_must_be_the_manifests(tmp_path: Path) -> None:
    path = hazy(tmp_path, sample())
    with_sidecar(path)
    with pytest.raises(InvalidCartridge, match=r"'other', its manifest has 'patient_04'"):
        import_checkpoint(path, MODEL, cartridge_id="other")
    assert (
        import_checkpoint(path, MODEL, cartridge_id="patient_04", default_id="x").manifest.cartridge_id == "patient_04"
    )


def test_no_id(tmp_path: Path) -> None:
    path = hazy(tmp_path, sample())
    with pytest.raises(InvalidInput, match="needs an id"):
        import_checkpoint(path, MODEL)
    assert import_checkpoint(path, MODEL, default_id="x").manifest.cartridge_id == "x"


def test_a_manifest_that_is_not_there_or_none(tmp_path: Path) -> None:
    path = hazy(tmp_path, sample())
    with pytest.raises(NotFound, match=r"no\.json"):
        import_checkpoint(path, MODEL, manifest_path=tmp_path / "no.json")
    for text in ("", "[]", "{", "null", '{"cartridge_id": "a"}', "[" * 100_000, '{"a": NaN}', '{"a": 1, "a": 2}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InvalidCartridge, match=r"bad\.json"):
            import_checkpoint(path, MODEL, manifest_path=tmp_path / "bad.json")


def test_what_was_trained_keeps_no_token_ids(tmp_path: Path) -> None:
    """Its first tokens may be knlp's, which are a prefill no more; an engine must not compute it again from ids."""
    path = knlp(tmp_path, sample())
    assert import_checkpoint(path, MODEL, cartridge_id="doc").token_ids is not None
    assert import_checkpoint(path, MODEL, cartridge_id="doc", training_steps=5).token_ids is None


# -- models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 4}, "num_layers: the checkpoint has 3, the model 4"),
        ({"num_kv_heads": 1}, "num_kv_heads: the checkpoint has 2, the model 1"),
        ({"head_dim": 4}, "head_dim"),
        ({"dtype": "float32"}, "dtype: the checkpoint has 'bfloat16', the model 'float32'"),
    ],
)
def test_another_model_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(LayoutMismatch, match=message):
        import_checkpoint(hazy(tmp_path, sample()), dataclasses.replace(MODEL, **changes), cartridge_id="doc")


def test_all_differences_are_told(tmp_path: Path) -> None:
    other = dataclasses.replace(MODEL, num_layers=9, num_kv_heads=9, head_dim=9, model_id="org/other")
    with pytest.raises(LayoutMismatch) as caught:
        import_checkpoint(peft(tmp_path, sample()), other, cartridge_id="doc")
    assert str(caught.value).count(": the checkpoint") == 4


def test_a_named_model_is_compared_by_its_last_part(tmp_path: Path) -> None:
    path = knlp(tmp_path, sample(), model="/home/somebody/models/tiny")
    assert import_checkpoint(path, MODEL, cartridge_id="doc").manifest.model_id == "org/tiny"
    knlp(tmp_path, sample(), model="Qwen/Qwen2.5-7B-Instruct")
    with pytest.raises(LayoutMismatch, match=r"model_id: the checkpoint says 'Qwen/Qwen2\.5-7B-Instruct'") as caught:
        import_checkpoint(path, MODEL, cartridge_id="doc")
    assert "--model-id" in str(caught.value.hint)


def test_without_a_model_it_is_what_the_checkpoint_says(tmp_path: Path) -> None:
    manifest = import_checkpoint(peft(tmp_path, sample()), cartridge_id="doc").manifest
    assert (manifest.model_id, manifest.model_revision, manifest.num_layers, manifest.dtype) == (
        "org/tiny",
        None,
        3,
        "bfloat16",
    )
    with pytest.raises(InvalidInput, match="does not say which model") as caught:
        import_checkpoint(legacy_cache(tmp_path, sample()), cartridge_id="doc")
    assert "--model" in str(caught.value.hint)


def test_a_conversion_on_request(tmp_path: Path) -> None:
    wide = dataclasses.replace(MODEL, dtype="float32")
    path = hazy(tmp_path, sample(model=wide))
    with pytest.raises(LayoutMismatch) as caught:
        import_checkpoint(path, MODEL, cartridge_id="doc")
    assert caught.value.hint == "--dtype bfloat16 converts it"
    made = import_checkpoint(path, MODEL, cartridge_id="doc", dtype="bfloat16")
    assert torch.equal(made.layer(0)[0], sample(model=wide)[0][0].bfloat16())
