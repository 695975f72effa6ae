"""Engines that kvist was never run on do not start with it, and say why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
model, store, version, settings = arguments
if version:
    import vllm, vllm.version
    vllm.__version__ = vllm.version.__version__ = version
try:
    make_llm(model, store, **settings)
    emit("")
except BaseException as error:
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    emit("\\n".join(texts))
"""

REFUSED = [
    ("0.27.1", {}, ["0.27.1", "0.28"]),
    ("0.99.0", {}, ["0.99.0", "0.28"]),
    (
        "",
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
        ["speculative decoding"],
    ),
]


@pytest.mark.parametrize(("version", "settings", "said"), REFUSED, ids=["older", "newer", "speculative"])
def test_refused_by_name(
    version: str,
    settings: dict[str, Any],
    said: list[str],
    model: Callable[..., Path],
    run_offline: Callable[..., Any],
    tmp_path: Path,
) -> None:
    message = run_offline(SCRIPT, str(model()), (tmp_path / "store").as_uri(), version, settings)
    for text in said:
        assert text in message, message


def test_accepted(model: Callable[..., Path], run_offline: Callable[..., Any], tmp_path: Path) -> None:
    """The control: the same script starts what is not to be refused."""
    assert run_offline(SCRIPT, str(model()), (tmp_path / "store").as_uri(), "", {}) == ""
