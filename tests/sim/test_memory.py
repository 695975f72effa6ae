"""Bytes of a token, from the configs of models as they are published (the fields that matter)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvist.errors import InvalidInput, KvistError, NotFound, UnsupportedModel
from kvist.sim.memory import KvShape, read_shape

LLAMA_8B = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "torch_dtype": "bfloat16",
}
QWEN3 = LLAMA_8B | {"head_dim": 128, "num_hidden_layers": 36, "sliding_window": None, "use_sliding_window": False}
DEEPSEEK_V3 = {
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "torch_dtype": "bfloat16",
}


def written(path: Path, config: Any) -> Path:
    file = path / "config.json"
    file.write_text(config if isinstance(config, str) else json.dumps(config))
    return file


@pytest.mark.parametrize(
    ("config", "gpus", "expected"),
    [
        (LLAMA_8B, 1, 131_072),
        (LLAMA_8B, 8, 131_072),
        (LLAMA_8B, 16, 262_144),  # 8 heads on 16 GPUs: each is there twice
        (QWEN3, 1, 147_456),
        ({"text_config": LLAMA_8B}, 1, 131_072),
        ({k: v for k, v in LLAMA_8B.items() if k != "num_key_value_heads"}, 1, 524_288),
        (DEEPSEEK_V3, 1, 61 * 576 * 2),
        (DEEPSEEK_V3, 8, 8 * 61 * 576 * 2),
    ],
)
def test_bytes_of_a_token(tmp_path: Path, config: dict[str, Any], gpus: int, expected: int) -> None:
    file = written(tmp_path, config)
    assert read_shape(file).bytes_per_token(gpus) == expected
    assert read_shape(tmp_path).bytes_per_token(gpus) == expected
    assert read_shape(file, dtype="fp8e4m3").bytes_per_token(gpus) == expected // 2


@pytest.mark.parametrize(
    ("config", "error", "names"),
    [
        ("{", InvalidInput, "JSON"),
        ([], InvalidInput, "object"),
        (LLAMA_8B | {"num_hidden_layers": 0}, InvalidInput, "num_hidden_layers"),
        (LLAMA_8B | {"num_key_value_heads": "8"}, InvalidInput, "num_key_value_heads"),
        (LLAMA_8B | {"torch_dtype": "int4"}, InvalidInput, "dtype"),
        (LLAMA_8B | {"sliding_window": 4096}, UnsupportedModel, "sliding_attention"),
        (LLAMA_8B | {"layer_types": ["full_attention", "linear_attention"]}, UnsupportedModel, "linear_attention"),
    ],
)
def test_what_can_not_be_sized_is_refused_by_name(
    tmp_path: Path, config: Any, error: type[KvistError], names: str
) -> None:
    with pytest.raises(error, match=names):
        read_shape(written(tmp_path, config))


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_shape(tmp_path)
    with pytest.raises(InvalidInput, match="layers"):
        KvShape(layers=0, kv_heads=1, head_size=1)
    with pytest.raises(InvalidInput, match="dtype"):
        KvShape(layers=1, kv_heads=1, head_size=1, dtype="int4")
    with pytest.raises(InvalidInput, match="gpus"):
        KvShape(layers=1, kv_heads=1, head_size=1).bytes_per_token(0)
