"""A causal LM whose KV cache is laid down and read back: what building, training and judging cartridges share.

With `kvist.cartridge.loading` the door to transformers of this package. Must not know a cartridge's files.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvist.cartridge.loading import eos_ids, load
from kvist.cartridge.model import ModelIdentity
from kvist.errors import InvalidInput, UnsupportedModel
from kvist.hashing.weights import revision

Layers = Sequence[tuple[Tensor, Tensor]]
"""K after RoPE, and V, of each layer, ``[tokens, KV heads, head dimension]``: a prefix."""

Progress = Callable[[int, int], None]
"""Called with how much is done, of how much."""


class CausalModel:
    """A loaded model, frozen, in evaluation mode.

    Attributes:
        directory: it was loaded from.
        identity: of the cartridges it makes.
        tokenizer: transformers' own, or ``None`` where the directory has none.
        eos_ids: ids that end an answer.
        end: the one of them that the model's own answers end with, for the tokenizer; ``None``: it has none.
    """

    def __init__(self, model: Any, tokenizer: Any, directory: Path, identity: ModelIdentity) -> None:
        self.directory = directory
        self.identity = identity
        self.tokenizer = tokenizer
        self.eos_ids = eos_ids(model, tokenizer)
        self.end: int | None = getattr(tokenizer, "eos_token_id", None)
        self._model = model

    @classmethod
    def open(
        cls, directory: str | Path, *, device: str = "cpu", dtype: str | None = None, model_id: str | None = None
    ) -> Self:
        """Load a model.

        Args:
            directory: with ``config.json`` and safetensors.
            device: ``"cpu"``, ``"cuda"`` or ``"cuda:<n>"``.
            dtype: of weights and KV cache, as torch names it; default that of the files.
            model_id: default the directory's name.

        Raises:
            NotFound: there is no ``config.json``.
            InvalidInput: no such device or dtype.
            UnsupportedModel: transformers has no causal LM for it without running its own code, its safetensors are
                not all there, or its cache is not one of plain keys and values.
        """
        path = Path(directory)
        model, tokenizer = load(path, device, dtype)
        name = str(model.dtype).removeprefix("torch.")
        identity = ModelIdentity.of_directory(path, dtype=name, model_id=model_id, revision=revision(path))
        return cls(model, tokenizer, path, identity)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        device: torch.device = self._model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights and of its KV cache."""
        dtype: torch.dtype = self._model.dtype
        return dtype

    @property
    def max_positions(self) -> int | None:
        """Positions it can take; ``None``: nothing bounds them. Under ``longrope`` its first, short range."""
        text = self._model.config.get_text_config(decoder=True)
        rope = getattr(text, "rope_parameters", None) or {}
        short = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
        bounds = [getattr(text, "max_position_embeddings", None), short]
        return min((int(bound) for bound in bounds if bound), default=None)

    def numerics(self) -> dict[str, Any]:
        """What besides the tokens decides the bits that it computes; JSON."""
        return {
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "attention": str(self._model.config._attn_implementation),
            "threads": torch.get_num_threads(),
        }

    def require_room(self, tokens: int, what: str) -> None:
        """Refuse what has no position.

        Raises:
            InvalidInput: ``tokens`` are more than the model has positions; nothing is ever cut off to fit.
        """
        if self.max_positions is not None and tokens > self.max_positions:
            raise InvalidInput(f"{what}: {tokens} tokens, and the model has {self.max_positions} positions")

    # -- computing -----------------------------------------------------------------------------------------------

    def prefill(self, ids: Sequence[int], *, chunk: int = 512, progress: Progress | None = None) -> Layers:
        """Keys and values of a text that begins at position 0.

        Args:
            ids: at least one.
            chunk: tokens of one forward pass: what bounds the memory.
            progress: is told of every chunk.

        Raises:
            InvalidInput: no ids, ids that the model does not know, or more than it has positions.
            UnsupportedModel: the cache that comes out is not one of plain keys and values, alike in every layer.
        """
        self._check_ids(ids)
        self.require_room(len(ids), "the text")
        cache = DynamicCache()
        for start in range(0, len(ids), chunk):
            piece = torch.tensor([ids[start : start + chunk]], device=self.device)
            with torch.no_grad():
                self._forward(piece, cache, torch.arange(start, start + piece.shape[1])[None], keep=1)
            if start == 0:
                self._check_cache(cache)
            if progress is not None:
                progress(min(start + chunk, len(ids)), len(ids))
        return [(layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)) for layer in cache.layers]

    def logits(self, ids: Tensor, prefix: Layers | None, *, keep: int | Tensor = 0) -> Tensor:
        """Logits of rows that all go on after one prefix, at the position where it ends.

        Differentiable in the prefix. Rows of unequal length are padded on the right: what a token sees is before it.

        Args:
            ids: ``[rows, tokens]``.
            prefix: ``None``: the rows begin at position 0.
            keep: of which tokens to compute logits: the last so many (0: all), or these indices.

        Returns:
            float32, ``[rows, kept tokens, vocabulary]``.
        """
        cache, first = self._cache_of(prefix, ids.shape[0])
        positions = torch.arange(first, first + ids.shape[1])[None].expand(ids.shape[0], -1)
        logits = self._forward(ids.to(self.device), cache, positions, keep=keep)
        return logits.float()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        prefix: Layers | None,
        *,
        most: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> list[list[int]]:
        """Continue each prompt after the prefix, until an id of `eos_ids`, which is left out.

        Args:
            prompts: ids, each at least one; of any lengths.
            prefix: see `logits`.
            most: ids of one answer.
            temperature: 0 takes the likeliest id.
            generator: on the CPU; needed where the temperature is not 0.
        """
        groups: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            # a window counts padding, too, so where there is one, rows of unequal length cannot go side by side
            groups.setdefault(len(prompt) if self._has_windows else 0, []).append(row)
        answers: list[list[int]] = [[] for _ in prompts]
        for rows in groups.values():
            given = [prompts[row] for row in rows]
            for row, said in zip(rows, self._generate(given, prefix, most, temperature, generator), strict=True):
                answers[row] = said
        return answers

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        prefix: Layers | None,
        most: int,
        temperature: float,
        generator: torch.Generator | None,
    ) -> list[list[int]]:
        longest = max(len(prompt) for prompt in prompts)
        lacking = torch.tensor([longest - len(prompt) for prompt in prompts])
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        cache, first = self._cache_of(prefix, len(prompts))
        offsets = torch.arange(longest)[None]
        positions = (offsets - lacking[:, None]).clamp_min(0) + first
        seen = torch.cat((torch.ones(len(prompts), first), (offsets >= lacking[:, None]).float()), 1).long()
        answers: list[list[int]] = [[] for _ in prompts]
        running = torch.ones(len(prompts), dtype=torch.bool)
        with torch.no_grad():
            for _ in range(most):
                padded = None if seen.all() else seen.to(self.device)
                logits = self._forward(ids.to(self.device), cache, positions, keep=1, mask=padded)
                drawn = _draw(logits[:, -1].float().cpu(), temperature, generator)
                running &= torch.tensor([int(one) not in self.eos_ids for one in drawn])
                if not running.any():
                    break
                for row in running.nonzero().flatten().tolist():
                    answers[row].append(int(drawn[row]))
                ids, positions = drawn[:, None], positions[:, -1:] + 1
                seen = torch.cat((seen, torch.ones(len(prompts), 1, dtype=torch.long)), 1)
        return answers

    def _forward(
        self, ids: Tensor, cache: DynamicCache, positions: Tensor, *, keep: int | Tensor, mask: Tensor | None = None
    ) -> Tensor:
        arguments: dict[str, Any] = {"attention_mask": mask} if mask is not None else {}
        if "logits_to_keep" in self._parameters:
            arguments["logits_to_keep"] = keep.to(self.device) if isinstance(keep, Tensor) else keep
        logits: Tensor = self._model(
            input_ids=ids,
            position_ids=positions.to(self.device),
            past_key_values=cache,
            use_cache=True,
            **arguments,
        ).logits
        if "logits_to_keep" in arguments:
            return logits
        return logits[:, keep.to(self.device)] if isinstance(keep, Tensor) else logits[:, -keep:]

    @property
    def _has_windows(self) -> bool:
        text = self._model.config.get_text_config(decoder=True)
        return bool(getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None))

    @property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self._model.forward).parameters

    def _cache_of(self, prefix: Layers | None, rows: int) -> tuple[DynamicCache, int]:
        """A cache of layers that keep every token: the masks of sliding windows are the model's own."""
        cache = DynamicCache()
        for index, (keys, values) in enumerate(prefix or ()):
            lying = [
                tensor.to(self.device, self.dtype).transpose(0, 1)[None].expand(rows, -1, -1, -1)
                for tensor in (keys, values)
            ]
            cache.update(lying[0], lying[1], index)
        return cache, prefix[0][0].shape[0] if prefix else 0

    def _check_ids(self, ids: Sequence[int]) -> None:
        vocabulary = self._model.get_input_embeddings().num_embeddings
        strange = [one for one in ids if not 0 <= one < vocabulary]
        if not ids or strange:
            got = f"{strange[0]}" if strange else "none"
            raise InvalidInput(f"expected at least one token id, each in [0, {vocabulary}), got {got}")

    def _check_cache(self, cache: DynamicCache) -> None:
        """What `ModelIdentity.of_directory` read is what the model does."""
        kind, wanted = self._model.config.model_type, self.identity
        shape = (wanted.num_kv_heads, wanted.head_dim)
        if len(cache.layers) != wanted.num_layers:
            raise UnsupportedModel(
                f"{kind}: expected {wanted.num_layers} layers with keys and values, got {len(cache.layers)}"
            )
        for index, layer in enumerate(cache.layers):
            if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
                raise UnsupportedModel(f"{kind}: layer {index} caches a {type(layer).__name__}, not keys and values")
            for what, tensor in (("keys", layer.keys), ("values", layer.values)):
                if (tensor.shape[1], tensor.shape[3]) != shape or tensor.dtype != self.dtype:
                    raise UnsupportedModel(
                        f"{kind}: layer {index} has {what} of {tensor.shape[1]} heads of {tensor.shape[3]}, "
                        f"{tensor.dtype}; expected {shape[0]} of {shape[1]}, {self.dtype}"
                    )


def _draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)[:, 0]
