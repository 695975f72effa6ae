"""The model: one tile in, the keys and values of its rows into the pool, and one row of logits out.

Knows torch, the cache adapter and tiles. Must not know sequences, scheduling or threads.

A *tile* is a forward pass of one fixed shape: batch 1, as many rows as a page has tokens, aligned to the page. Row
``r`` of page ``p`` is position ``p * T + r``. To compute a page takes one tile with all rows live; to decode a token
takes one tile with one live row, the others are dead: id 0, their keys and values dropped. Attention always gathers
``(p + 1) * T`` keys. So every product and every reduction that makes a token's keys, values and logits has the same
shape whenever it is computed; rows do not mix but through the causal mask; and the bits are a function of the tokens.

This is checked, not assumed: `Model.load` computes a few tokens in two ways and compares bits, falls back from
``sdpa`` to ``eager`` attention if they differ, and says in `canonical` how it ended.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import transformers
from torch.nn.functional import cosine_similarity

from kvist.cartridge.model import ModelIdentity
from kvist.engines.hf.cache import PagedCache
from kvist.engines.hf.load import max_positions, open_model, probe
from kvist.engines.hf.pool import DTYPES, PagePool
from kvist.engines.hf.sampling import Row
from kvist.errors import UnsupportedModel
from kvist.hashing.weights import revision
from kvist.layout import Layout

_LEAST_SIMILARITY = 0.98


class Model:
    """A loaded causal LM that computes tiles.

    Attributes:
        layout: of its pages.
        max_positions: positions it can take, or ``None``.
        vocab: ids it knows are ``range(vocab)``.
        eos_ids: ids that end a text.
        canonical: the bits of keys, values and logits are a function of the tokens alone. False for a model whose
            rows mix (some mixtures of experts): then they also depend on which rows shared a tile.
    """

    def __init__(self, model: Any, layout: Layout, directory: Path) -> None:
        self.layout = layout
        self._directory = directory
        self.max_positions = max_positions(model.config)
        self.vocab = int(model.get_input_embeddings().num_embeddings)
        self.eos_ids = _eos_ids(model)
        self._model = model
        self._one_row = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.canonical = self._check()
        if not self.canonical and self.attention != "eager":
            model.set_attn_implementation("eager")
            self.canonical = self._check()

    @classmethod
    def load(
        cls, directory: str | Path, *, device: str, dtype: str | None, page_size_tokens: int, name: str | None
    ) -> Self:
        """Load the model in ``directory``; see `kvist.engines.hf.load` for what is refused, and how.

        Args:
            directory: with ``config.json`` and safetensors.
            device: ``"cpu"``, ``"cuda"`` or ``"cuda:<n>"``.
            dtype: of weights and cache; ``None`` takes that of the files.
            page_size_tokens: rows of a tile.
            name: the layout's model name; default the directory's.
        """
        path = Path(directory)
        model = open_model(path, device, dtype)
        geometry = probe(model)
        layout = Layout(
            page_size_tokens=page_size_tokens,
            n_layers=geometry.layers,
            n_heads=geometry.heads,
            head_dim=geometry.head_dim,
            dtype=geometry.dtype,
            model=name or path.resolve().name,
            revision=revision(path),
        )
        return cls(model, layout, path)

    @cached_property
    def identity(self) -> ModelIdentity:
        """What a cartridge for this model must be of.

        Raises:
            InvalidInput, UnsupportedModel: its configuration is of a kind of which there are no cartridges.
        """
        layout = self.layout
        told = ModelIdentity.of_directory(
            self._directory,
            dtype=str(DTYPES[layout.dtype]).removeprefix("torch."),
            model_id=layout.model,
            revision=layout.revision,
        )
        # What a forward pass showed counts, whatever the configuration says.
        return replace(told, num_layers=layout.n_layers, num_kv_heads=layout.n_heads, head_dim=layout.head_dim)

    @property
    def device(self) -> torch.device:
        """Where the weights are, and the pool should be."""
        device: torch.device = self._model.device
        return device

    @property
    def attention(self) -> str:
        """Transformers' name for the attention that runs."""
        return str(self._model.config._attn_implementation)

    def numerics(self) -> dict[str, Any]:
        """What besides the layout decides the bits."""
        cuda = self.device.type == "cuda"
        return {
            "engine": "kvist.engines.hf",
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "dtype": self.layout.dtype,
            "weights": str(self._model.dtype).removeprefix("torch."),
            "attention": self.attention,
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "canonical": self.canonical,
        }

    def tile(self, cache: PagedCache, slots: Sequence[int], tokens: Sequence[int], row: int) -> Row:
        """Compute ``tokens`` as rows ``row``, ``row + 1``, ... of the last page of ``slots``.

        Args:
            cache: of the pool that the slots are in.
            slots: of the sequence, up to and including the page in hand, which nobody else may read now.
            tokens: ids of the live rows; at least one, and not past the end of the page.
            row: the page's first row that is not computed yet.

        Returns:
            float32 logits of the last live row, ``[vocabulary]``, on the CPU and the caller's own.
        """
        size = self.layout.page_size_tokens
        end = row + len(tokens)
        first = (len(slots) - 1) * size
        assert 0 <= row < end <= size
        ids = [0] * row + list(tokens) + [0] * (size - end)
        # Dead rows past the last position would look up what is not there.
        last = first + size - 1 if self.max_positions is None else self.max_positions - 1
        cache.aim(slots, slice(row, end))
        with torch.inference_mode():
            device = self.device
            positions = torch.arange(first, first + size, device=device).clamp_(max=last)
            inputs: dict[str, Any] = {
                "input_ids": torch.tensor([ids], device=device),
                "position_ids": positions[None],
                "past_key_values": cache,
                "use_cache": True,
            }
            if self._one_row:
                inputs["logits_to_keep"] = torch.tensor([end - 1], device=device)
            logits = self._model(**inputs).logits[0, 0 if self._one_row else end - 1]
            return np.array(logits.float().cpu().numpy(), copy=True)

    def _check(self) -> bool:
        """Compute some tokens by pages, and again row by row: are the bits the same?

        Raises:
            UnsupportedModel: the logits are not those of a plain forward pass.
        """
        size = self.layout.page_size_tokens
        tokens = [(7 + 31 * n) % self.vocab for n in range(size + max(1, size // 2))][: self.max_positions]
        whole, pages = self._run_cuts(tokens, [size, len(tokens)])
        cuts = sorted({1, size // 2, size, len(tokens) - 2, len(tokens) - 1, len(tokens)})
        pieces, same_pages = self._run_cuts(tokens, cuts)
        with torch.inference_mode():
            ids = torch.tensor([tokens], device=self.device)
            plain = self._model(input_ids=ids, use_cache=False).logits[0, -1].float().cpu()
        paged = torch.from_numpy(whole)
        similarity = float(cosine_similarity(plain - plain.mean(), paged - paged.mean(), dim=0))
        if not similarity >= _LEAST_SIMILARITY:
            raise UnsupportedModel(
                f"{self._model.config.model_type}: logits computed over pages differ from a plain forward pass "
                f"(similarity {similarity:.4f}, expected at least {_LEAST_SIMILARITY}): it does not read its cache, "
                "masks or positions as other models do"
            )
        return bool(np.array_equal(whole, pieces) and torch.equal(pages, same_pages))

    def _run_cuts(self, tokens: Sequence[int], cuts: Sequence[int]) -> tuple[Row, torch.Tensor]:
        """Logits after ``tokens``, computed up to each of ``cuts`` in turn, and the pages' bytes."""
        size = self.layout.page_size_tokens
        pool = PagePool(self.layout, 2, self.device)
        cache, start = PagedCache(pool.data), 0
        logits = np.zeros(0, dtype=np.float32)
        for cut in cuts:
            end = min(cut, len(tokens))
            if end > start:
                page = start // size
                logits = self.tile(cache, range(page + 1), tokens[start:end], start - page * size)
                start = end
        return logits, pool.data.view(torch.uint8)


def _eos_ids(model: Any) -> frozenset[int]:
    for config in (getattr(model, "generation_config", None), model.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids if isinstance(ids, list | tuple) else [ids])
    return frozenset()
