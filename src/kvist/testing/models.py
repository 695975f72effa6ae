"""Tiny models and a tokenizer, made on disk from a seed: what tests, demos and CI run where no hub can be reached.

Knows the configurations of a few model families. Must not know engines. Torch and transformers are imported inside
the functions, so that importing this module costs nothing.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from kvist.errors import InvalidInput

FAMILIES: Final = ("llama", "qwen2", "qwen3", "gpt2", "gemma2", "gemma3", "mistral", "qwen3_moe")
"""Model families that `make_model` can make; ``"deepseek_v2"`` too, whose latent cache only serving engines page."""

SHAPES: Final[dict[str, dict[str, Any]]] = {
    "tiny": {"family": "llama"},
    "windows": {"family": "gemma3", "layers": 6, "full_every": 3, "sliding_window": 64},
    "latent": {"family": "deepseek_v2", "heads": 4},
    "realistic": {"family": "llama", "layers": 15, "hidden": 1024, "heads": 16, "kv_heads": 8},
}
"""Models that a serving engine loads, by what they are for, as arguments of `make_model`.

``tiny``: 2.6 million parameters, grouped queries. ``windows``: two layers with a sliding window to each with full
attention. ``latent``: one latent vector a token in place of K and V (MLA). ``realistic``: 143 million parameters, so
that a prefill costs what it costs.
"""

BOS_ID: Final = 1
EOS_ID: Final = 2

_SPECIALS: Final = ("<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_CHAT_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_CORPUS: Final = (
    "The quick brown fox jumps over the lazy dog while the other dogs are sleeping in the morning sun.",
    "A branch of a tree is a twig, and from every twig another twig can grow without copying the tree.",
    "Store the keys and the values of the tokens once, and continue from there as often as you like.",
    "What is the answer to the question that the user has asked? Let us think about it step by step.",
    "def main(): print('hello world')  # returns nothing and raises nothing",
)


def make_model(
    directory: str | Path,
    family: str = "llama",
    *,
    layers: int = 4,
    hidden: int = 256,
    heads: int = 8,
    kv_heads: int = 4,
    head_dim: int | None = None,
    vocab: int = 512,
    max_len: int = 8192,
    sliding_window: int = 24,
    full_every: int = 2,
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """Write a causal LM with seeded random weights.

    The weights are drawn so that logits are spread (a standard deviation of about 3): greedy output varies instead of
    repeating one token, and a changed bit of context shows in the logits.

    Args:
        directory: made if missing; gets ``config.json``, ``generation_config.json`` and ``model.safetensors``.
        family: one of `FAMILIES`.
        layers: decoder layers.
        hidden: width of the residual stream.
        heads: query heads.
        kv_heads: KV heads; GPT-2 has no grouped queries and takes ``heads``.
        head_dim: elements of one head; default ``hidden // heads``.
        vocab: ids; at least 263 if `make_tokenizer` is to fit.
        max_len: positions of the model.
        sliding_window: window of the families that have one (Gemma; Mistral: all layers).
        full_every: of Gemma's layers each so-many-th has full attention, the others the window.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; how the weights are stored.
        seed: of the weights. Same arguments, same file, on one version of torch.

    Returns:
        ``directory`` as a path.

    Raises:
        InvalidInput: the family or dtype is not known.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InvalidInput(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    settings = _settings(family, layers, hidden, heads, kv_heads, head_dim, vocab, max_len, sliding_window, full_every)
    model_type = "gemma3_text" if family == "gemma3" else family
    config = AutoConfig.for_model(model_type, **settings, bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=0)
    config.dtype = dtype
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim >= 2:
                embedding = any(part in name for part in ("embed", "wte", "wpe", "lm_head"))
                # Conv1D (GPT-2) stores [in, out], Linear [out, in]; gain 1 keeps the stream's variance either way.
                fan_in = parameter.shape[-2] if family == "gpt2" else parameter.shape[-1]
                scale = 0.7 if "lm_head" not in name and embedding else (3.0 if embedding else 1.6) / fan_in**0.5
                if family in ("gemma2", "gemma3") and "lm_head" not in name and embedding:
                    scale /= hidden**0.5  # Gemma multiplies by that; else the last token would drown all context
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            elif family == "gemma3" and name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.fill_(1.0)  # of unit size, queries and keys would attend to all tokens nearly alike
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size="100GB")
    return path


def _settings(
    family: str,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int | None,
    vocab: int,
    max_len: int,
    sliding_window: int,
    full_every: int,
) -> dict[str, Any]:
    """The family's own names for the arguments of `make_model`."""
    if family == "gpt2":
        return {
            "n_layer": layers,
            "n_embd": hidden,
            "n_head": heads,
            "vocab_size": vocab,
            "n_positions": max_len,
            "tie_word_embeddings": False,
        }
    head_dim = head_dim or hidden // heads
    settings: dict[str, Any] = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": max_len,
        "tie_word_embeddings": False,
    }
    kinds = ["sliding_attention", "full_attention"]
    if family in ("gemma2", "gemma3"):
        settings |= {"sliding_window": sliding_window, "query_pre_attn_scalar": head_dim}
        settings["layer_types"] = [kinds[(n + 1) % full_every == 0] for n in range(layers)]
    elif family == "mistral":
        settings["sliding_window"] = sliding_window
    elif family == "deepseek_v2":
        # The latent widths of the real models: attention kernels are written for them. No layer is a mixture.
        settings |= {"kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64}
        settings |= {"v_head_dim": 32, "first_k_dense_replace": layers, "num_key_value_heads": heads, "head_dim": 64}
        settings |= {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
    elif family == "qwen3_moe":
        settings |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": hidden}
    elif family not in FAMILIES:
        raise InvalidInput(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    return settings


def make_shape(directory: str | Path, shape: str, *, dtype: str = "float32", **changes: Any) -> Path:
    """Write one of `SHAPES` with its tokenizer, for a serving engine to load.

    Args:
        directory: made if missing.
        shape: key of `SHAPES`.
        dtype: as in `make_model`.
        **changes: further arguments of `make_model`.

    Returns:
        ``directory`` as a path.

    Raises:
        InvalidInput: the shape is not known, or what `make_model` refuses.
    """
    if shape not in SHAPES:
        raise InvalidInput(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    settings = SHAPES[shape] | {"dtype": dtype} | changes
    return make_tokenizer(make_model(directory, **settings), vocab=settings.get("vocab", 512))


def make_tokenizer(directory: str | Path, *, vocab: int = 512) -> Path:
    """Write a byte-level BPE tokenizer, trained on a few built-in sentences, with a chat template.

    Any text encodes and decodes to itself. Ids 0, 1 and 2 are padding, begin and end of text, as in `make_model`.

    Args:
        directory: made if missing; gets ``tokenizer.json`` and ``tokenizer_config.json``.
        vocab: at most so many ids; at least 263 (256 bytes and the special tokens).

    Returns:
        ``directory`` as a path.

    Raises:
        InvalidInput: ``vocab`` is too small.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab < 256 + len(_SPECIALS):
        raise InvalidInput(f"a byte-level vocabulary has at least {256 + len(_SPECIALS)} ids, got {vocab}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(_SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": _SPECIALS[0],
        "bos_token": _SPECIALS[1],
        "eos_token": _SPECIALS[2],
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return path


def words(count: int, *, seed: int = 0) -> str:
    """``count`` made-up words, the same for the same seed: prompts of any length for demos and benchmarks."""
    import random

    generator = random.Random(seed)
    letters: Sequence[str] = string.ascii_lowercase
    return " ".join("".join(generator.choices(letters, k=generator.randint(2, 8))) for _ in range(count))
