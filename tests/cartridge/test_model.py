"""Which model a directory holds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from kvist.cartridge.model import ModelIdentity, canonical_rope, revision_like
from kvist.errors import InvalidInput, UnsupportedModel
from kvist.hashing.weights import revision
from kvist.testing.models import make_model, make_tokenizer

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "torch_dtype": "bfloat16",
    "rope_theta": 500000,
}


def write(directory: Path, config: object) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_a_plain_config(tmp_path: Path) -> None:
    model = ModelIdentity.of_directory(write(tmp_path / "tiny", LLAMA))
    assert model == ModelIdentity(
        model_id="tiny",
        num_layers=3,
        num_kv_heads=2,
        head_dim=16,
        dtype="bfloat16",
        rope={"rope_theta": 500000.0, "rope_type": "default"},
    )


def test_what_the_caller_knows_better(tmp_path: Path) -> None:
    given = {"dtype": "float16", "model_id": "org/tiny", "revision": "r1"}
    model = ModelIdentity.of_directory(write(tmp_path, LLAMA), **given)
    assert {name: getattr(model, name) for name in given} == given


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_key_value_heads": None}, (3, 4, 16)),
        ({"head_dim": 40}, (3, 2, 40)),
        ({"num_kv_heads": 1, "num_key_value_heads": None}, (3, 1, 16)),
        ({"multi_query": True, "num_key_value_heads": None}, (3, 1, 16)),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, (3, 2, 16)),
    ],
)
def test_shapes(tmp_path: Path, changes: dict[str, Any], expected: tuple[int, int, int]) -> None:
    model = ModelIdentity.of_directory(write(tmp_path, LLAMA | changes))
    assert (model.num_layers, model.num_kv_heads, model.head_dim) == expected


def test_gpt2_has_its_own_names_and_no_rope(tmp_path: Path) -> None:
    model = ModelIdentity.of_directory(write(tmp_path, {"n_layer": 2, "n_head": 4, "n_embd": 32}))
    assert (model.num_layers, model.num_kv_heads, model.head_dim, model.dtype) == (2, 4, 8, "float32")
    assert model.rope == {}


def test_a_text_model_inside_another(tmp_path: Path) -> None:
    outer = {"model_type": "gemma3", "dtype": "float16", "text_config": LLAMA | {"torch_dtype": None}}
    model = ModelIdentity.of_directory(write(tmp_path, outer))
    assert (model.num_layers, model.dtype) == (3, "float16")


def test_a_directory_of_the_hub_cache_knows_its_name_and_commit(tmp_path: Path) -> None:
    commit = "ab" * 20
    directory = write(tmp_path / "models--org--tiny" / "snapshots" / commit, LLAMA)
    model = ModelIdentity.of_directory(directory)
    assert (model.model_id, model.revision) == ("org/tiny", commit)
    assert revision_like(directory, None) == commit


def test_the_tokenizer_is_hashed(tmp_path: Path) -> None:
    write(tmp_path, LLAMA)
    (tmp_path / "tokenizer.model").write_bytes(b"sp")
    assert ModelIdentity.of_directory(tmp_path).tokenizer_hash == "sha256:" + hashlib.sha256(b"sp").hexdigest()
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    assert ModelIdentity.of_directory(tmp_path).tokenizer_hash == "sha256:" + hashlib.sha256(b"{}").hexdigest()


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (LLAMA | {"kv_lora_rank": 512}, UnsupportedModel),
        (LLAMA | {"num_kv_shared_layers": 2}, UnsupportedModel),
        (LLAMA | {"layer_types": ["linear_attention", "full_attention"]}, UnsupportedModel),
        (LLAMA | {"torch_dtype": "float8_e4m3fn"}, InvalidInput),
        (LLAMA | {"num_hidden_layers": 0}, InvalidInput),
        (LLAMA | {"num_hidden_layers": "3"}, InvalidInput),
        (LLAMA | {"rope_scaling": 5}, InvalidInput),
        (LLAMA | {"rope_parameters": {"rope_theta": {"a": 1}, "factor": 2}}, InvalidInput),
        ({"model_type": "llama"}, InvalidInput),
        ([LLAMA], InvalidInput),
    ],
)
def test_what_cannot_be_said_or_held_is_refused(tmp_path: Path, config: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        ModelIdentity.of_directory(write(tmp_path, config))


def test_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        ModelIdentity.of_directory(tmp_path / "none")
    (tmp_path / "config.json").write_bytes(b"{")
    with pytest.raises(InvalidInput):
        ModelIdentity.of_directory(tmp_path)


SCALED = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192.0, "rope_theta": 500000.0}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {}),
        ({"rope_theta": 10000}, {"rope_theta": 10000.0, "rope_type": "default"}),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, {"rope_theta": 1e4, "rope_type": "default"}),
        ({"rope_theta": 1e4, "rope_scaling": None}, {"rope_theta": 1e4, "rope_type": "default"}),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {"type": "llama3", "factor": 8, "original_max_position_embeddings": 8192},
            },
            SCALED,
        ),
        ({"rope_parameters": SCALED}, SCALED),
        (
            {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
            {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5},
        ),
        ({"rope_theta": 1e4, "partial_rotary_factor": 1.0}, {"rope_theta": 1e4, "rope_type": "default"}),
    ],
)
def test_a_rope_is_the_same_however_it_is_written(config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert canonical_rope(config) == expected


def test_two_ropes_for_two_kinds_of_layers() -> None:
    old = canonical_rope({"rope_theta": 1_000_000, "rope_local_base_freq": 10_000})
    new = canonical_rope(
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
            }
        }
    )
    assert old == new and old["sliding_attention"]["rope_theta"] == 10_000.0


@pytest.mark.parametrize(
    "value",
    ["1" + "0" * 400, "1e999", "NaN", "-Infinity", "[" * 700 + "]" * 700, "[[1]]", '{"a": 1}', '"\\ud800"', "[null]"],
    ids=lambda value: value[:12],
)
def test_a_rope_of_nonsense_is_refused(tmp_path: Path, value: str) -> None:
    for key in ("rope_theta", "rope_scaling"):
        given = value if key == "rope_theta" else f'{{"factor": {value}}}'
        text = f'{{"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "{key}": {given}}}'
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InvalidInput):
            ModelIdentity.of_directory(tmp_path)


def test_a_directory_of_the_hubs_cache_says_the_same_to_all(tmp_path: Path) -> None:
    """Whoever asks: what a cartridge is pinned to, and what an engine says of its model."""
    commit = "a" * 40
    for path, name in (("models--org--n/snapshots", "org/n"), ("x/snapshots", commit)):
        directory = tmp_path / path / commit
        directory.mkdir(parents=True)
        config = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}
        (directory / "config.json").write_text(json.dumps(config))
        model = ModelIdentity.of_directory(directory)
        assert (model.model_id, model.revision) == (name, commit)
        assert revision(directory) == revision_like(directory, None) == commit


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen3"])
def test_what_transformers_writes_is_read(tmp_path: Path, family: str) -> None:
    """Of real files: and a pinned revision is the digest of the weights."""
    directory = make_model(tmp_path / family, family, layers=2, hidden=64, heads=4, kv_heads=2, vocab=300)
    make_tokenizer(directory, vocab=300)
    model = ModelIdentity.of_directory(directory, revision=revision(directory))
    assert (model.num_layers, model.num_kv_heads) == (2, 4 if family == "gpt2" else 2)
    assert bool(model.rope) == (family != "gpt2")
    assert model.tokenizer_hash is not None
    assert revision_like(directory, model.revision) == model.revision
    assert revision_like(directory, "a" * 40) is None is revision_like(directory, None)
