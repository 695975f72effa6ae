"""Checkpoints of other projects, read and compared bit for bit; and what is refused in them, by name."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from kvist.cartridge.formats import read_checkpoint
from kvist.cartridge.model import DTYPES, ModelIdentity
from kvist.errors import InvalidCartridge, InvalidInput, NotFound, UnsafeCheckpoint

from .checkpoints import (
    FROZEN,
    SINKS,
    TOKENS,
    WRITERS,
    batched,
    is_same,
    knlp,
    legacy_cache,
    peft,
    sample,
    trainable,
)


def save(path: Path, tree: Any) -> Path:
    torch.save(tree, path)
    return path


@pytest.fixture
def pt(tmp_path: Path) -> Path:
    return tmp_path / "cartridge.pt"


# -- every family, exactly ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_reads_what_was_written(name: str, tmp_path: Path) -> None:
    layers = sample()
    imported = read_checkpoint(WRITERS[name](tmp_path, layers))
    assert is_same(imported, layers)
    assert (imported.num_tokens, imported.num_kv_heads, imported.head_dim, imported.dtype) == (TOKENS, 2, 8, "bfloat16")
    assert imported.num_frozen_tokens == (FROZEN if name in SINKS else 0)


models = st.builds(
    ModelIdentity,
    model_id=st.just("org/tiny"),
    num_layers=st.integers(1, 4),
    num_kv_heads=st.integers(1, 5),
    head_dim=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(sorted(WRITERS)), model=models, tokens=st.integers(FROZEN + 1, 40), seed=st.integers(0, 999)
)
def test_any_shape(name: str, model: ModelIdentity, tokens: int, seed: int) -> None:
    layers = sample(tokens, model, seed)
    with tempfile.TemporaryDirectory() as scratch:
        assert is_same(read_checkpoint(WRITERS[name](Path(scratch), layers)), layers)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_any_protocol(protocol: int, pt: Path) -> None:
    """`torch.save` writes 2 unless it is told otherwise; `torch.load(weights_only=True)` reads little of the others."""
    layers = sample()
    torch.save(
        trainable(layers, kind=lambda items: nn.ParameterList(map(nn.Parameter, items))), pt, pickle_protocol=protocol
    )
    assert is_same(read_checkpoint(pt), layers)


def test_tensors_that_share_a_storage_and_are_views_of_it(pt: Path) -> None:
    """As ``fixed`` and ``trainable`` of one cache, or K and V of one projection, are before ``contiguous()``."""
    layers = sample()
    whole = torch.stack([torch.stack([batched(key), batched(value)]) for key, value in layers])
    tree = {
        "trainable_keys": [whole[n, 0, :, :, FROZEN:] for n in range(3)],
        "trainable_values": [whole[n, 1, :, :, FROZEN:] for n in range(3)],
        "frozen_keys": [whole[n, 0, :, :, :FROZEN] for n in range(3)],
        "frozen_values": [whole[n, 1, :, :, :FROZEN] for n in range(3)],
    }
    assert is_same(read_checkpoint(save(pt, tree)), layers)
    transposed = [(key.transpose(0, 1)[None], value.transpose(0, 1)[None]) for key, value in layers]
    assert is_same(read_checkpoint(save(pt, transposed)), layers)


# -- frozen tokens: groups A5 to A11 of the original -------------------------------------------------------------


@pytest.mark.parametrize("sink", ["frozen", "fixed"])
def test_frozen_tokens_come_first(sink: str, pt: Path) -> None:
    layers = sample(32)
    imported = read_checkpoint(save(pt, trainable(layers, 2, sink)))
    assert imported.num_tokens == 32
    assert imported.layers[0][0].shape == (32, 2, 8)
    assert torch.equal(imported.layers[1][0][:2], layers[1][0][:2])
    assert (imported.num_frozen_tokens, imported.source_format) == (2, "trainable_cache")


def test_frozen_tokens_are_counted_along_the_tokens(pt: Path) -> None:
    """HazyResearch issues 18 and 23: counted along axis 1, one sink of eight heads would be eight tokens."""
    model = ModelIdentity(model_id="m", num_layers=2, num_kv_heads=8, head_dim=4, dtype="float32")
    imported = read_checkpoint(save(pt, trainable(sample(9, model), 1)))
    assert (imported.num_frozen_tokens, imported.num_tokens) == (1, 9)


@pytest.mark.parametrize("absent", [[], None, ()])
def test_no_frozen_tokens(absent: object, pt: Path) -> None:
    layers = sample()
    tree = trainable(layers, 0) | {"frozen_keys": absent, "frozen_values": absent}
    assert read_checkpoint(save(pt, tree)).num_frozen_tokens == 0
    assert is_same(read_checkpoint(save(pt, {k: v for k, v in tree.items() if "trainable" in k})), layers)


def test_frozen_layers_must_be_as_many(pt: Path) -> None:
    tree = trainable(sample())
    for name in ("frozen_keys", "frozen_values"):
        with pytest.raises(InvalidCartridge, match="2 frozen"):
            read_checkpoint(save(pt, tree | {name: tree[name][:2]}))
    with pytest.raises(InvalidCartridge, match="0 frozen values"):
        read_checkpoint(save(pt, tree | {"frozen_values": []}))


def test_frozen_tokens_must_be_as_many_in_each_layer(pt: Path) -> None:
    """Even where the sums agree, the sink would be another one a layer."""
    tree = trainable(sample(8), 2)
    for half in ("keys", "values"):
        first, rest = tree[f"frozen_{half}"][0], tree[f"trainable_{half}"][0]
        tree[f"frozen_{half}"][0] = torch.cat([first, rest[:, :, :1]], 2)
        tree[f"trainable_{half}"][0] = rest[:, :, 1:]
    with pytest.raises(InvalidCartridge, match=r"as many frozen tokens in every layer, got \[2, 3\]"):
        read_checkpoint(save(pt, tree))


def test_two_sinks_are_refused(pt: Path) -> None:
    with pytest.raises(InvalidCartridge, match="frozen_keys and fixed_keys"):
        read_checkpoint(save(pt, trainable(sample(), sink="frozen") | trainable(sample(), sink="fixed")))


def test_layers_must_have_one_shape(pt: Path) -> None:
    tree = trainable(sample())
    for name in ("trainable_keys", "trainable_values"):
        for cut in (tree[name][1][:, :, :16], tree[name][1][..., :4], tree[name][1][:, :1]):
            other = [tree[name][0], cut, tree[name][2]]
            with pytest.raises(InvalidCartridge, match=r"layer 1 .*(shape|differ)"):
                read_checkpoint(save(pt, tree | {name: other}))


def test_unrecognised(pt: Path) -> None:
    for tree in ({"weights": torch.zeros(3)}, {}, [], [1, 2], torch.zeros(2), 3, "text", None, {"cache": 5}):
        with pytest.raises(InvalidCartridge, match="unrecognised"):
            read_checkpoint(save(pt, tree))


def test_a_dict_without_keys_or_values(pt: Path) -> None:
    tree = trainable(sample())
    for name in ("trainable_keys", "trainable_values"):
        for changed in ({k: v for k, v in tree.items() if k != name}, tree | {name: None}):
            with pytest.raises(InvalidCartridge, match=f"cannot find {name}"):
                read_checkpoint(save(pt, changed))
    with pytest.raises(InvalidCartridge, match="cannot find prefix_values"):
        read_checkpoint(save(pt, {"reasoncache": {"prefix_keys": tree["trainable_keys"]}}))


# -- faults: group H of the original -----------------------------------------------------------------------------


def test_broken_files(pt: Path) -> None:
    data = save(pt, trainable(sample())).read_bytes()
    for broken in (data[: len(data) // 2], data[:-1], data[:40], b"\x00\xff\xfe\xfd" * 1000, b"", b"PK\x03\x04"):
        pt.write_bytes(broken)
        with pytest.raises(InvalidCartridge, match=str(pt)):
            read_checkpoint(pt)


def test_missing_files(tmp_path: Path) -> None:
    for path in (tmp_path / "no.pt", tmp_path):
        with pytest.raises(NotFound, match=str(path)):
            read_checkpoint(path)


def test_no_layers_and_no_tokens(pt: Path) -> None:
    with pytest.raises(InvalidCartridge, match="at least one"):
        read_checkpoint(save(pt, {"trainable_keys": [], "trainable_values": []}))
    with pytest.raises(InvalidCartridge, match="at least one"):
        read_checkpoint(
            save(pt, {"trainable_keys": [torch.zeros(1, 2, 0, 8)], "trainable_values": [torch.zeros(1, 2, 0, 8)]})
        )


def test_as_many_keys_as_values(pt: Path) -> None:
    tree = trainable(sample(), 0)
    with pytest.raises(InvalidCartridge, match="3 and 2"):
        read_checkpoint(save(pt, tree | {"trainable_values": tree["trainable_values"][:2]}))


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "parameter_dict"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none(name: str, number: float, tmp_path: Path) -> None:
    """The original loads them; a NaN in one key makes every answer of every request NaN."""
    layers = sample()
    layers[2][1][17, 1, 3] = number
    with pytest.raises(InvalidCartridge, match="layer 2 V holds a NaN or an infinity"):
        read_checkpoint(WRITERS[name](tmp_path, layers))


@pytest.mark.parametrize("shape", [(2, 32, 8), (2, 2, 32, 8), (1, 1, 2, 32, 8), (8,)])
def test_other_axes(shape: tuple[int, ...], pt: Path) -> None:
    with pytest.raises(InvalidCartridge, match=r"expected \[1, heads, tokens, head_dim\], got shape"):
        read_checkpoint(save(pt, [(torch.zeros(shape), torch.zeros(shape))]))


def test_things_that_are_no_tensors(pt: Path) -> None:
    for item in (3, "text", None, [torch.zeros(1)], {"a": torch.zeros(1)}):
        with pytest.raises(InvalidCartridge, match=r"trainable_keys\[0\] must be a tensor, got"):
            read_checkpoint(save(pt, {"trainable_keys": [item], "trainable_values": []}))
    with pytest.raises(InvalidCartridge, match="must be a list with a tensor a layer, got StoredTensor"):
        read_checkpoint(save(pt, {"trainable_keys": torch.zeros(1, 2, 3, 4), "trainable_values": []}))


# -- data types --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_data_type_is_kept(dtype: str, pt: Path) -> None:
    model = ModelIdentity(model_id="m", num_layers=2, num_kv_heads=2, head_dim=4, dtype=dtype)
    layers = sample(5, model)
    imported = read_checkpoint(legacy_cache(pt.parent, layers))
    assert imported.dtype == dtype
    assert is_same(imported, layers)


def test_a_data_type_is_converted_on_request_only(pt: Path) -> None:
    pairs = [(torch.randn(1, 2, 5, 4, dtype=torch.float64), torch.randn(1, 2, 5, 4)) for _ in range(2)]
    with pytest.raises(InvalidCartridge, match="got float32, float64") as caught:
        read_checkpoint(save(pt, pairs))
    assert "--dtype" in str(caught.value.hint)
    imported = read_checkpoint(pt, dtype="bfloat16")
    assert imported.dtype == "bfloat16"
    assert torch.equal(imported.layers[0][0], pairs[0][0][0].transpose(0, 1).bfloat16())
    with pytest.raises(InvalidInput, match="int8"):
        read_checkpoint(pt, dtype="int8")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1, 2, 0, 4), "some elements"),
        (torch.zeros(1, 2, 5, 4, dtype=torch.float64), "dtype must be one of"),
    ],
    ids=["empty", "float64"],
)
def test_what_a_file_of_safetensors_cannot_have(tensor: torch.Tensor, message: str, tmp_path: Path) -> None:
    """Its reader is that of cartridges; files of torch.save can have both."""
    named = {f"{half}_cache.{n}": torch.zeros(1, 2, 5, 4) for half in ("key", "value") for n in range(2)}
    save_file(named | {"frozen_keys.0": tensor}, tmp_path / "a.safetensors")
    with pytest.raises(InvalidCartridge, match=message):
        read_checkpoint(tmp_path / "a.safetensors", dtype="bfloat16")


def test_a_conversion_that_overflows(pt: Path) -> None:
    big = torch.full((1, 2, 5, 4), 1e6)
    with pytest.raises(InvalidCartridge, match="layer 0 K holds a NaN or an infinity"):
        read_checkpoint(save(pt, [(big, big.clone())]), dtype="float16")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float8_e4m3fn, torch.bool])
def test_data_types_of_no_cartridge(dtype: torch.dtype, pt: Path) -> None:
    with pytest.raises(InvalidCartridge, match=str(dtype).removeprefix("torch.")):
        read_checkpoint(save(pt, [(torch.zeros(1, 2, 5, 4).to(dtype),) * 2]), dtype="bfloat16")


def test_tensors_of_other_kinds_beside_are_passed_over(pt: Path) -> None:
    tree = trainable(sample()) | {"step": torch.tensor(7), "scale": torch.ones(2).to(torch.float8_e5m2), "lr": 0.02}
    assert read_checkpoint(save(pt, tree)).num_tokens == TOKENS


# -- caches of transformers, knlp --------------------------------------------------------------------------------


def test_a_dynamic_cache_is_refused_by_its_class(pt: Path) -> None:
    transformers = pytest.importorskip("transformers")
    cache = transformers.DynamicCache(ddp_cache_data=[(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4))])
    with pytest.raises(UnsafeCheckpoint, match=r"transformers\.cache_utils\.DynamicCache") as caught:
        read_checkpoint(save(pt, cache))
    assert "torch.save([(layer.keys, layer.values) for layer in cache.layers], path)" in str(caught.value.hint)
    by_hint = read_checkpoint(save(pt, [(layer.keys, layer.values) for layer in cache.layers]))
    iterated = read_checkpoint(save(pt, list(cache)))
    assert is_same(iterated, by_hint.layers)


def test_a_sliding_window_is_refused(pt: Path) -> None:
    """Its layer may lack the first tokens, which no shape says."""
    transformers = pytest.importorskip("transformers")
    pairs = [(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), torch.tensor([4]))]
    cache = transformers.DynamicCache(ddp_cache_data=pairs)
    state = {
        name: value for name, value in vars(cache.layers[0]).items() if name in ("keys", "values", "sliding_window")
    }
    for tree in (list(cache), {"layers": [state]}, [state]):
        with pytest.raises(InvalidCartridge, match="layer 0 has a sliding window"):
            read_checkpoint(save(pt, tree))


def test_knlp_keeps_the_token_ids_of_a_prefill(tmp_path: Path) -> None:
    imported = read_checkpoint(knlp(tmp_path, sample(), init_method_canonical="first_k"))
    assert imported.token_ids == tuple(range(100, 100 + TOKENS))
    assert (imported.model_id, imported.resource_kind, imported.meta["block_size"]) == ("org/tiny", "kv_prefix", 16)


def test_knlp_strided_is_no_prefill_of_its_token_ids(tmp_path: Path) -> None:
    """Its keys were taken out of a longer text and rotated anew."""
    assert read_checkpoint(knlp(tmp_path, sample(), init_method_canonical="strided_rope")).token_ids is None


@pytest.mark.parametrize("method", ["strided_rope", "sci", "legacy_sci", 5, None])
def test_knlp_of_before_canonical_names(method: object, tmp_path: Path) -> None:
    """``sci`` was what is ``strided_rope`` now."""
    assert read_checkpoint(knlp(tmp_path, sample(), init_method=method)).token_ids is None
    known = knlp(tmp_path, sample(), init_method=method, init_method_canonical="sci_chunk")
    assert read_checkpoint(known).token_ids is not None


@pytest.mark.parametrize("method", [{}, {"init_method": "first_k"}])
def test_knlp_of_the_script_that_knows_one_way(method: dict[str, str], tmp_path: Path) -> None:
    assert read_checkpoint(knlp(tmp_path, sample(), **method)).token_ids is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 4}, "n_layers 4, the checkpoint has 3"),
        ({"budget_tokens": 31}, "budget_tokens 31, the checkpoint has 32"),
        ({"prefix_token_ids_sha256": "00" * 32}, "SHA-256"),
    ],
)
def test_knlp_files_must_agree(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidCartridge, match=message):
        read_checkpoint(knlp(tmp_path, sample(), **changes))


@pytest.mark.parametrize("ids", [[1] * 31, ["1"] * 32, [-1] * 32, [2**32] * 32, {"a": 1}, [True] * 32])
def test_knlp_token_ids_must_be_some(ids: object, tmp_path: Path) -> None:
    knlp(tmp_path, sample())
    (tmp_path / "prefix_token_ids.json").write_text(json.dumps(ids))
    with pytest.raises(InvalidCartridge, match=r"prefix_token_ids\.json"):
        read_checkpoint(tmp_path)


# -- PEFT --------------------------------------------------------------------------------------------------------


def test_peft_prefix_tuning(tmp_path: Path) -> None:
    layers = sample()
    config = {"peft_type": "PREFIX_TUNING", "prefix_projection": False, "num_frozen_tokens": 0}
    imported = read_checkpoint(peft(tmp_path, layers, **config))
    assert is_same(imported, layers)
    assert (imported.num_frozen_tokens, imported.resource_kind) == (0, "kv_prefix")


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "LORA"},
        {"peft_type": "PREFIX_TUNING", "prefix_projection": True},
        {"num_virtual_tokens": TOKENS + 1},
        {"num_layers": None},
        {"num_layers": -3},
        {"num_attention_heads": 3},
        {"token_dim": 0},
        {"token_dim": 1 << 40},
        {"num_transformer_submodules": 2},
        {"num_frozen_tokens": TOKENS + 1},
        {"num_frozen_tokens": -1},
        {"num_frozen_tokens": "1"},
    ],
)
def test_peft_configurations_that_do_not_fit(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InvalidCartridge, match=r"adapter_config|prompt_embeddings"):
        read_checkpoint(peft(tmp_path, sample(), **changes))


def test_peft_without_a_configuration(tmp_path: Path) -> None:
    peft(tmp_path, sample())
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(InvalidCartridge, match=r"adapter_config\.json"):
        read_checkpoint(tmp_path / "adapter_model.safetensors")
