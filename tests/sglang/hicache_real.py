"""SGLang's own classes, imported without the warnings of its imports, which would be errors in a test."""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from typing import Any

HAS_SGLANG = any(importlib.metadata.distributions(name="sglang"))


def load(name: str) -> Any:
    """A module of SGLang."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"sglang.srt.{name}")


if HAS_SGLANG:
    for each in ("observability.metrics_collector", "runtime_context", "mem_cache.hicache_storage"):
        load(each)
