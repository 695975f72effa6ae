"""Each model family against its own plain forward pass, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kvist.engines.hf import Engine
from kvist.errors import InvalidInput, NotFound, UnsupportedModel
from kvist.testing.models import FAMILIES, make_tokenizer

from .driving import params, prompt

Load = Callable[..., Engine]
Models = Callable[..., Path]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_a_plain_forward_pass(family: str, load: Load, model_dir: Models) -> None:
    """Over three pages and, where there is one, past the sliding window (24); prefilled and decoded."""
    engine = load(family)
    ids = prompt(41)
    outputs = engine.submit(ids, params(20)).result()
    generated = [output.token_id for output in outputs]
    plain = AutoModelForCausalLM.from_pretrained(model_dir(family)).eval()
    with torch.inference_mode():
        expected = plain(torch.tensor([ids + generated]), use_cache=False).logits[0, len(ids) - 1 : -1]
    actual = np.stack([output.logits for output in outputs])
    np.testing.assert_allclose(actual, expected.numpy(), atol=2e-4, rtol=1e-4)
    assert engine.model.canonical
    assert len(set(generated)) > 5, "a degenerate model proves little"


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_short_dtypes_are_stored_as_they_are(dtype: str, load: Load) -> None:
    engine = load(dtype=dtype)
    assert engine.layout.dtype == dtype
    assert engine.layout.page_bytes == 2 * 16 * 2 * 16 * 2
    assert engine.numerics()["weights"] == {"bf16": "bfloat16", "f16": "float16"}[dtype]
    assert engine.model.canonical
    assert len(engine.submit(prompt(20), params(3)).result()) == 3


def test_the_layout_says_what_the_cache_is(load: Load, model_dir: Models) -> None:
    layout = load().layout
    assert (layout.n_layers, layout.n_heads, layout.head_dim, layout.dtype) == (2, 2, 16, "f32")
    assert (layout.model, layout.memory_order, layout.page_size_tokens) == ("tiny", "LNHD", 16)
    assert layout.revision is not None
    assert layout.revision.startswith("blake3:")


def test_the_revision_pins_the_weights_wherever_they_lie(model_dir: Models, tmp_path: Path) -> None:
    shutil.copytree(model_dir(), tmp_path / "copy")
    same, other = Engine.load(tmp_path / "copy", pages=2), Engine.load(model_dir(seed=1), pages=2)
    original = Engine.load(model_dir(), pages=2)
    assert same.layout.revision == original.layout.revision != other.layout.revision
    assert same.layout.model == "copy"


def test_positions_end_where_the_model_does(load: Load) -> None:
    """GPT-2 looks positions up; a page that reaches past the last one must not."""
    engine = load("gpt2", page_size_tokens=48, pages=16)
    outputs = engine.submit(prompt(505), params(20)).result()
    assert [output.finish_reason for output in outputs] == [None] * 6 + ["length"]


def _config(directory: Path, kind: str, **settings: object) -> Path:
    config = AutoConfig.for_model(kind, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def test_state_space_models_are_refused(tmp_path: Path) -> None:
    path = _config(tmp_path, "mamba", hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4)
    with pytest.raises(UnsupportedModel, match="past_key_values"):
        Engine.load(path)


def test_latent_attention_is_refused(tmp_path: Path) -> None:
    """Its two latents, which it keeps as keys and values, differ in size and do not fit one page."""
    path = _config(
        tmp_path, "deepseek_v2", hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=64,
        num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=16, q_lora_rank=8, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1, n_routed_experts=2, moe_intermediate_size=8,
    )  # fmt: skip
    with pytest.raises(UnsupportedModel, match="keys of shape"):
        Engine.load(path)


def test_linear_attention_is_refused(tmp_path: Path) -> None:
    path = _config(
        tmp_path, "qwen3_next", hidden_size=32, intermediate_size=32, num_hidden_layers=2, vocab_size=64,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, num_experts=0, mlp_only_layers=[0, 1],
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    with pytest.raises(UnsupportedModel, match="layer 0 caches a LinearAttentionLayer"):
        Engine.load(path)


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("t5", d_model=32, num_layers=1, num_heads=2, d_kv=16).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        Engine.load(tmp_path)


def test_rope_that_remembers_other_sequences_is_refused(model_dir: Models, tmp_path: Path) -> None:
    shutil.copytree(model_dir(), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="dynamic"):
        Engine.load(tmp_path)


def test_pickled_weights_are_refused(model_dir: Models, tmp_path: Path) -> None:
    shutil.copy(model_dir() / "config.json", tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="safetensors"):
        Engine.load(tmp_path)


@pytest.fixture
def spoilt(model_dir: Models, tmp_path: Path) -> Path:
    """A copy of a model, to spoil."""
    return Path(shutil.copytree(model_dir(), tmp_path / "spoilt"))


def _change_config(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def test_missing_weights_are_refused_and_named(spoilt: Path) -> None:
    weights = load_file(spoilt / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, spoilt / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"lacks weights: model\.layers\.1\.mlp\.up_proj"):
        Engine.load(spoilt)


def test_tied_weights_may_be_missing(spoilt: Path) -> None:
    weights = load_file(spoilt / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, spoilt / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"lacks weights: lm_head\.weight"):
        Engine.load(spoilt)
    _change_config(spoilt, tie_word_embeddings=True)
    assert Engine.load(spoilt, pages=2).model.canonical


def test_weights_of_another_shape_are_refused(spoilt: Path) -> None:
    _change_config(spoilt, intermediate_size=48)
    with pytest.raises(UnsupportedModel, match=r"another shape.*mlp\.down_proj.* and 3 more"):
        Engine.load(spoilt)


@pytest.mark.parametrize("kept", [0, 5, 100, 200_000])
def test_truncated_weights_are_refused(kept: int, spoilt: Path) -> None:
    path = spoilt / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UnsupportedModel, match="cannot load"):
        Engine.load(spoilt)


@pytest.mark.parametrize("config", [{"hidden_size": "wide"}, {"model_type": "unheard-of"}, {"num_attention_heads": 0}])
def test_configs_that_make_no_sense_are_refused(config: dict[str, object], spoilt: Path) -> None:
    _change_config(spoilt, **config)
    with pytest.raises(UnsupportedModel):
        Engine.load(spoilt)


@pytest.mark.parametrize("device", ["abacus", "", "cpu:7", "cuda:x", "cuda:99", "meta", "mps"])
def test_devices_that_are_not_there_are_refused(device: str, model_dir: Models) -> None:
    with pytest.raises(InvalidInput, match="device"):
        Engine.load(model_dir(), device=device)


def test_wrong_arguments_are_refused(model_dir: Models, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"config\.json"):
        Engine.load(tmp_path)
    for wrong in (
        {"dtype": "f8"},
        {"device": "abacus"},
        {"pages": 0},
        {"page_size_tokens": 0},
        {"threads": 0},
        {"max_model_len": 0},
    ):
        with pytest.raises(InvalidInput):
            Engine.load(model_dir(), **wrong)


def test_the_tokenizer_is_lossless_and_fits(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path, vocab=300))
    assert len(tokenizer) <= 300
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    text = "  Hëllo\n\tworld 🌱 {}"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|bos|><|user|>hi<|end|><|assistant|>"
