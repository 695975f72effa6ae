"""A cartridge of a text, in front of a prompt, is that text in front of the prompt."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.cartridge.build import build
from kvist.cartridge.cartridge import Cartridge
from kvist.cartridge.causal import CausalModel
from kvist.cartridge.framing import Framing
from kvist.cartridge.model import ModelIdentity
from kvist.errors import InvalidInput, NotFound, UnsupportedModel
from kvist.hashing.weights import revision
from kvist.testing.models import FAMILIES, make_model, make_tokenizer, words

FARTHEST = 1e-4
"""Of logits that are up to about 10, over another cut of the prompt into forward passes, in float32."""


def ids_of(count: int) -> list[int]:
    return [1] + [(7 + 31 * number) % 500 for number in range(count - 1)]


def difference(model: CausalModel, cartridge: Cartridge, document: list[int], prompt: list[int]) -> float:
    layers = [cartridge.layer(index) for index in range(cartridge.num_layers)]
    whole = model.logits(torch.tensor([document + prompt]), None)[:, len(document) :]
    return float((whole - model.logits(torch.tensor([prompt]), layers)).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_after_a_cartridge_is_a_prompt_after_the_text(family: str, tmp_path: Path) -> None:
    kv_heads = 2 if family == "gpt2" else 1  # and windows of 24 tokens: far less than the document
    make_model(tmp_path, family, layers=4, hidden=64, heads=2, kv_heads=kv_heads, max_len=512)
    model, document, prompt = CausalModel.open(tmp_path), ids_of(100), [5, 9, 11, 200]
    cartridge = build(model, document, cartridge_id="x", chunk=33)
    assert difference(model, cartridge, document, prompt) < FARTHEST
    after = model.generate([prompt], [cartridge.layer(n) for n in range(4)], most=8)
    assert after == model.generate([document + prompt], None, most=8)


@settings(max_examples=25)
@given(tokens=st.integers(1, 120), chunk=st.integers(1, 130))
def test_any_length_in_any_chunks(tiny: CausalModel, tokens: int, chunk: int) -> None:
    document = ids_of(tokens)
    cartridge = build(tiny, document, cartridge_id="x", chunk=chunk)
    assert cartridge.num_tokens == tokens and cartridge.token_ids == tuple(document)
    assert difference(tiny, cartridge, document, [3, 4, 5]) < FARTHEST


def test_chunks_do_not_matter_but_for_rounding_and_the_same_chunks_give_the_same_bits(tiny: CausalModel) -> None:
    document = ids_of(90)
    one, two, other = (build(tiny, document, cartridge_id="x", chunk=chunk) for chunk in (32, 32, 90))
    assert one.identity == two.identity
    for index in range(one.num_layers):
        for a, b in zip(one.layer(index), other.layer(index), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_what_a_manifest_says(tiny: CausalModel, tiny_directory: Path, tmp_path: Path) -> None:
    text = words(20)
    made = build(tiny, text, cartridge_id="doc", source_document="a.txt", labels={"topic": "x"}, license="MIT")
    made.save_pretrained(tmp_path / "doc")
    read = Cartridge.from_pretrained(tmp_path / "doc")
    manifest = read.manifest
    assert manifest.model_revision == revision(tiny_directory)
    assert manifest.validate_against_model(ModelIdentity.of_directory(tiny_directory)) == []
    assert manifest.training_steps == 0 and not manifest.has_frozen_prefix and manifest.first_position == 0
    assert (manifest.source_document, manifest.labels, manifest.license) == ("a.txt", {"topic": "x"}, "MIT")
    assert manifest.provenance["method"] == "prefill" and manifest.provenance["prompt"]["kind"] == "text"
    assert read.token_ids == tuple(Framing(tiny.tokenizer).document(text))


def test_a_directory_will_do_for_a_model(tiny: CausalModel, tiny_directory: Path) -> None:
    assert (
        build(tiny_directory, ids_of(9), cartridge_id="x").identity == build(tiny, ids_of(9), cartridge_id="x").identity
    )


# -- refusing ----------------------------------------------------------------------------------------------------


def test_nothing_is_cut_off(tiny: CausalModel) -> None:
    assert build(tiny, ids_of(512), cartridge_id="x").num_tokens == 512
    with pytest.raises(InvalidInput, match="513 tokens, and the model has 512 positions"):
        build(tiny, ids_of(513), cartridge_id="x")
    with pytest.raises(InvalidInput, match="has 101 tokens, and 100 are allowed"):
        build(tiny, ids_of(101), cartridge_id="x", max_tokens=100)


@pytest.mark.parametrize("document", [[], [512], [-1], [3, 4, 10**9]])
def test_ids_that_the_model_does_not_know(tiny: CausalModel, document: list[int]) -> None:
    with pytest.raises(InvalidInput, match=r"each in \[0, 512\)"):
        build(tiny, document, cartridge_id="x")


def test_ids_are_no_chat(tiny: CausalModel) -> None:
    with pytest.raises(InvalidInput, match="give its text"):
        build(tiny, [1, 2], cartridge_id="x", is_chat=True)


def test_directories_that_are_no_model(tiny_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"config\.json"):
        CausalModel.open(tmp_path)
    with pytest.raises(InvalidInput, match="device"):
        CausalModel.open(tiny_directory, device="tpu")
    with pytest.raises(InvalidInput, match="dtype"):
        CausalModel.open(tiny_directory, dtype="int8")
    shutil.copytree(tiny_directory, tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UnsupportedModel, match="cannot load"):
        CausalModel.open(tmp_path / "broken")
    weights.unlink()
    torch.save({}, weights.with_name("pytorch_model.bin"))  # not looked at, let alone unpickled
    with pytest.raises(UnsupportedModel, match="cannot load"):
        CausalModel.open(tmp_path / "broken")


def test_weights_that_lack_some(tiny_directory: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_directory, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"missing keys: model\.layers\.1\.mlp\.up_proj\.weight"):
        CausalModel.open(tmp_path / "model")


def test_half_precision(tmp_path: Path) -> None:
    make_tokenizer(make_model(tmp_path, layers=2, hidden=64, heads=4, kv_heads=2, dtype="bfloat16"))
    made = build(tmp_path, words(30), cartridge_id="x")
    assert made.manifest.dtype == "bfloat16" and made.layer(0)[0].dtype == torch.bfloat16
    widened = build(CausalModel.open(tmp_path, dtype="float32"), words(30), cartridge_id="x")
    assert widened.manifest.dtype == "float32" and widened.identity != made.identity
