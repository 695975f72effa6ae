"""The manifest: its rules, its document, what it fits, and the sidecars of others."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvist.cartridge.manifest import CartridgeManifest, FileEntry, LayerShape, align_to_block_size
from kvist.cartridge.model import ModelIdentity
from kvist.errors import InvalidCartridge, InvalidInput, KvistError, LayoutMismatch

from .making import make_manifest

LLAMA = ModelIdentity(model_id="meta-llama/Llama-3.2-3B", num_layers=2, num_kv_heads=8, head_dim=128, dtype="bfloat16")
FILES = (FileEntry(name="cartridge.safetensors", size=10, sha256="0" * 64),)
WRONG: dict[str, Any] = {
    "model_id": "mistralai/Mistral-7B",
    "num_layers": 32,
    "num_kv_heads": 4,
    "head_dim": 64,
    "dtype": "float16",
}

# -- alignment ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "aligned"), [(64, 64), (632, 624), (15, 0), (0, 0), (16, 16)])
def test_alignment_rounds_down_to_full_blocks(tokens: int, aligned: int) -> None:
    assert align_to_block_size(tokens, 16) == aligned


@pytest.mark.parametrize(("tokens", "size"), [(-1, 16), (5, 0), (5, -4)])
def test_alignment_of_nonsense_is_refused(tokens: int, size: int) -> None:
    with pytest.raises(InvalidInput):
        align_to_block_size(tokens, size)


@given(tokens=st.integers(0, 10**9), size=st.integers(1, 4096))
def test_alignment_is_the_largest_multiple(tokens: int, size: int) -> None:
    aligned = align_to_block_size(tokens, size)
    assert aligned % size == 0 and aligned <= tokens < aligned + size


# -- what it fits ------------------------------------------------------------------------------------------------


def test_a_fitting_model_has_no_mismatches() -> None:
    assert make_manifest().validate_against_model(LLAMA) == []
    make_manifest().require(LLAMA)


@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_field_is_one_line_with_both_values(name: str) -> None:
    (line,) = make_manifest().validate_against_model(dataclasses.replace(LLAMA, **{name: WRONG[name]}))
    assert name in line and repr(WRONG[name]) in line and repr(getattr(make_manifest(), name)) in line


def test_all_wrong_fields_are_told_at_once() -> None:
    model = dataclasses.replace(LLAMA, **WRONG)
    assert len(make_manifest().validate_against_model(model)) == 5
    with pytest.raises(LayoutMismatch) as caught:
        make_manifest().require(model)
    assert all(name in str(caught.value) for name in WRONG)


@pytest.mark.parametrize(
    ("said", "served", "name"),
    [
        ({"model_revision": "r1"}, {"revision": "r2"}, "model_revision"),
        ({"rope": {"rope_theta": 1e4}}, {"rope": {"rope_theta": 5e5}}, "rope"),
        ({"tokenizer_hash": "sha256:1"}, {"tokenizer_hash": "sha256:2"}, "tokenizer_hash"),
    ],
)
def test_revision_rope_and_tokenizer_are_compared_where_both_know_them(
    said: dict[str, Any], served: dict[str, Any], name: str
) -> None:
    (line,) = make_manifest(**said).validate_against_model(dataclasses.replace(LLAMA, **served))
    assert line.startswith(name)
    assert make_manifest(**said).validate_against_model(LLAMA) == []
    assert make_manifest().validate_against_model(dataclasses.replace(LLAMA, **served)) == []


def test_a_directory_and_a_repository_of_one_model_fit() -> None:
    local = dataclasses.replace(LLAMA, model_id="Llama-3.2-3B")
    assert make_manifest().validate_against_model(local) == []
    assert make_manifest(model_revision="r1").validate_against_model(dataclasses.replace(local, revision="r1")) == []
    apart = make_manifest(model_revision="r1").validate_against_model(dataclasses.replace(local, revision="r2"))
    assert [line.partition(":")[0] for line in apart] == ["model_id", "model_revision"]


def test_block_size() -> None:
    assert make_manifest().validate_against_block_size(16) == []
    (line,) = make_manifest().validate_against_block_size(32)
    assert "16" in line and "32" in line


# -- identity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"checksum": "cd" * 32},
        {"model_id": "meta-llama/Llama-3.2-1B"},
        {"model_revision": "r1"},
        {"dtype": "float16"},
        {"layers": (LayerShape(num_kv_heads=8, head_dim=128), LayerShape(num_kv_heads=4, head_dim=128))},
        {"rope": {"rope_theta": 5e5}},
        {"first_position": 1},
    ],
)
def test_whatever_decides_the_keys_and_values_decides_the_identity(changes: dict[str, Any]) -> None:
    assert make_manifest(**changes).identity != make_manifest().identity


@pytest.mark.parametrize(
    "changes",
    [
        {"cartridge_id": "other"},
        {"labels": {"a": "b"}},
        {"created_at": "2026-01-01"},
        {"provenance": {"score": 0.5}},
        {"license": "mit"},
        {"files": FILES, "file_size_bytes": 10},
        {"training_steps": 3},
    ],
)
def test_what_is_only_said_of_it_does_not(changes: dict[str, Any]) -> None:
    assert make_manifest(**changes).identity == make_manifest().identity
    assert len(make_manifest().identity) == 64


# -- the document ------------------------------------------------------------------------------------------------


def full() -> CartridgeManifest:
    return make_manifest(
        labels={"patient": "01", "": "é", "a.b'\"": "x"},
        rope={"rope_theta": 500000.0, "rope_type": "llama3", "long_factor": [1.0, 2.5]},
        provenance={"made_by": "kvist", "arms": [{"name": "none", "accuracy": 0.25}]},
        files=FILES,
        file_size_bytes=10,
        model_revision="r1",
        tokenizer_hash="sha256:1",
        created_at="2026-01-01T00:00:00+00:00",
        has_token_ids=False,
    )


@pytest.mark.parametrize("manifest", [make_manifest(), full(), make_manifest(labels={})])
def test_round_trip(manifest: CartridgeManifest) -> None:
    assert CartridgeManifest.from_json(manifest.to_json()) == manifest
    assert CartridgeManifest.from_dict(manifest.to_dict()) == manifest
    assert CartridgeManifest.from_json(manifest.to_json().encode()).identity == manifest.identity


def test_the_document_is_complete() -> None:
    document = full().to_dict()
    assert set(document) == {field.name for field in dataclasses.fields(CartridgeManifest)}
    assert document["files"] == [{"name": "cartridge.safetensors", "size": 10, "sha256": "0" * 64}]
    assert document["layers"] == [{"num_kv_heads": 8, "head_dim": 128}] * 2
    assert document["schema_version"] == 1


def test_labels_may_be_many_or_none() -> None:
    assert make_manifest(labels={}).labels == {}
    assert make_manifest(labels={"patient": "01", "kind": "record"}).labels["kind"] == "record"


@pytest.mark.parametrize("version", [None, 0, 2, "1", 1.0, True])
def test_another_schema_version_is_refused(version: object) -> None:
    with pytest.raises(InvalidCartridge, match="schema_version"):
        CartridgeManifest.from_dict(full().to_dict() | {"schema_version": version})


@pytest.mark.parametrize("name", ["cartridge_id", "model_id", "num_layers", "checksum", "layers", "files", "dtype"])
def test_a_missing_key_is_refused(name: str) -> None:
    document = full().to_dict()
    del document[name]
    with pytest.raises(InvalidCartridge, match=name):
        CartridgeManifest.from_dict(document)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 3},
        {"num_layers": "2"},
        {"num_layers": True},
        {"num_kv_heads": 4},
        {"num_tokens_raw": 0, "num_tokens_aligned": 0, "num_blocks": 0, "num_frozen_tokens": 0},
        {"num_tokens_raw": 640},
        {"num_tokens_aligned": 632},
        {"num_blocks": 40},
        {"num_tokens_raw": -1},
        {"num_frozen_tokens": 0},
        {"num_frozen_tokens": 633},
        {"has_frozen_prefix": False},
        {"has_frozen_prefix": 1},
        {"dtype": "float64"},
        {"dtype": "unknown"},
        {"dtype": 16},
        {"block_size": 0},
        {"checksum": ""},
        {"checksum": "AB" * 32},
        {"kv_layout": "HTD"},
        {"cartridge_id": "../x"},
        {"cartridge_id": ""},
        {"cartridge_id": 7},
        {"model_id": ""},
        {"model_id": None},
        {"model_revision": 5},
        {"tokenizer_hash": ""},
        {"resource_kind": "weights"},
        {"labels": {"a": 1}},
        {"labels": ["a"]},
        {"labels": {"a": "\ud800"}},
        {"provenance": [1]},
        {"provenance": {"x": float("nan")}},
        {"rope": {"x": float("inf")}},
        {"rope": None},
        {"layers": []},
        {"layers": [{"num_kv_heads": 8, "head_dim": 128}]},
        {"layers": [{"num_kv_heads": 8, "head_dim": 128, "x": 1}] * 2},
        {"layers": [{"num_kv_heads": 8, "head_dim": 0}] * 2},
        {"layers": {"a": 1}},
        {"files": "x"},
        {"files": [{"name": "../x.safetensors", "size": 10, "sha256": "0" * 64}]},
        {"files": [{"name": "a/x.safetensors", "size": 10, "sha256": "0" * 64}]},
        {"files": [{"name": ".x.safetensors", "size": 10, "sha256": "0" * 64}]},
        {"files": [{"name": "x.pt", "size": 10, "sha256": "0" * 64}]},
        {"files": [{"name": "x.safetensors", "size": 0, "sha256": "0" * 64}]},
        {"files": [{"name": "x.safetensors", "size": 10, "sha256": "0" * 63}]},
        {"files": [{"name": "x.safetensors", "size": 5, "sha256": "0" * 64}] * 2},
        {"files": [{"name": "x.safetensors", "size": 11, "sha256": "0" * 64}]},
        {"files": [["x.safetensors", 10, "0" * 64]]},
        {"file_size_bytes": 11},
        {"unknown": 1},
        {"training_steps": -1},
        {"created_at": 5},
        {"has_token_ids": "yes"},
        {"has_token_ids": True, "training_steps": 1},
        {"has_token_ids": True, "first_position": 1},
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidCartridge):
        CartridgeManifest.from_dict(full().to_dict() | changes)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff{}", b'{"a":1,"a":2}', b'{"a":NaN}', b"null", b"[" * 5000])
def test_what_is_no_document_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidCartridge):
        CartridgeManifest.from_json(text)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_mutated_document_is_refused_or_reads_back(data: st.DataObject) -> None:
    """Any JSON in the place of any value: a typed error, or a manifest that is written as it was read."""
    document = full().to_dict()
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    junk = st.recursive(
        scalars, lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=4), s, max_size=3)
    )
    for _ in range(data.draw(st.integers(1, 3))):
        document[data.draw(st.sampled_from(sorted(document)))] = data.draw(junk)
    try:
        manifest = CartridgeManifest.from_json(json.dumps(document))
    except KvistError:
        return
    assert CartridgeManifest.from_json(manifest.to_json()) == manifest


# -- sidecars of others ------------------------------------------------------------------------------------------

SIDECAR: dict[str, Any] = {
    "cartridge_id": "longhealth patient 01",
    "model_id": "meta-llama/Llama-3.2-3B-Instruct",
    "num_layers": 28,
    "num_kv_heads": 8,
    "head_dim": 128,
    "dtype": "unknown",
    "num_tokens_raw": 632,
    "num_tokens_aligned": 624,
    "block_size": 16,
    "num_blocks": 39,
    "has_frozen_prefix": True,
    "resource_kind": "cartridge",
    "checksum": "5f" * 32,
    "labels": {"patient": "01"},
    "training_steps": 270,
}


@pytest.mark.parametrize("name", ["provenance", "rope"])
@pytest.mark.parametrize("depth", [65, 500, 900])
def test_what_is_nested_too_deeply_is_refused_when_it_is_read(name: str, depth: int) -> None:
    """Not by a RecursionError of whoever writes it out later."""
    text = make_manifest().to_json().replace(f'"{name}": {{}}', f'"{name}": ' + '{"a":' * depth + "1.0" + "}" * depth)
    with pytest.raises(InvalidCartridge, match=r"64 objects|not JSON"):
        CartridgeManifest.from_json(text)


def test_as_deep_as_it_may_be_it_is_written_out() -> None:
    value: Any = 1
    for _ in range(63):
        value = {"a": [value]} if isinstance(value, int) else {"a": value}
    manifest = make_manifest(provenance=value)
    assert CartridgeManifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize("value", [10000, {"a": {"b": {}}}, [[1.0]], None])
def test_a_rotation_has_one_spelling(value: object) -> None:
    """Or one cartridge had two identities."""
    for rope in ({"rope_theta": value}, {"full_attention": {"rope_theta": value}}):
        with pytest.raises(InvalidCartridge, match="rope"):
            make_manifest(rope=rope)
    make_manifest(rope={"rope_theta": 10000.0, "rope_type": "yarn", "truncate": False, "short_factor": [1.0, 2.0]})


def test_true_is_no_number_of_a_rotation() -> None:
    manifest = make_manifest(rope={"rope_theta": True})
    assert manifest.validate_against_model(dataclasses.replace(manifest.model, rope={"rope_theta": 1.0}))


def test_a_sidecar_is_read_leniently() -> None:
    manifest = CartridgeManifest.from_dict(SIDECAR | {"connector_version": 3, "layers": 28}, lenient=True)
    assert (manifest.schema_version, manifest.layers, manifest.files) == (0, (), ())
    assert manifest.labels == {"patient": "01"} and manifest.training_steps == 270
    assert manifest.source_format == "trainable_cache"
    model = dataclasses.replace(LLAMA, model_id=SIDECAR["model_id"], num_layers=28, dtype="float16")
    assert manifest.validate_against_model(model) == []  # the dtype is not known


def test_a_sidecar_is_not_ours_unless_asked() -> None:
    with pytest.raises(InvalidCartridge) as caught:
        CartridgeManifest.from_dict(SIDECAR)
    assert caught.value.hint is not None and "import" in caught.value.hint


@pytest.mark.parametrize(
    "changes", [{"num_layers": None}, {"num_blocks": 40}, {"labels": 5}, {"num_tokens_raw": -2}, {"block_size": 0}]
)
def test_a_sidecar_that_contradicts_itself_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidCartridge):
        CartridgeManifest.from_dict(SIDECAR | changes, lenient=True)
