"""Models on disk that cartridges are made with. Transformers is imported only where one is opened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvist.testing.models import make_model, make_tokenizer

if TYPE_CHECKING:
    from kvist.cartridge.causal import CausalModel

RECALL = Path(__file__).parents[1] / "data" / "recall"
"""A model that has learnt the task of `kvist.testing.recall`."""


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with random weights, 512 positions and a tokenizer with a chat template."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    make_model(directory, layers=2, hidden=64, heads=4, kv_heads=2, max_len=512)
    return make_tokenizer(directory)


@pytest.fixture(scope="session")
def tiny(tiny_directory: Path) -> CausalModel:
    from kvist.cartridge.causal import CausalModel

    return CausalModel.open(tiny_directory)


@pytest.fixture(scope="session")
def recall() -> CausalModel:
    from kvist.cartridge.causal import CausalModel

    return CausalModel.open(RECALL)
