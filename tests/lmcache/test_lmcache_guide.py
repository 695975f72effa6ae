"""The configuration of docs/guides/lmcache.md, read by a real LMCache."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvist.engines.lmcache.settings import Settings

PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "lmcache.md").read_text()


def test_the_table_names_every_option() -> None:
    assert re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE) == list(Settings.__dataclass_fields__)


@pytest.mark.lmcache
def test_the_configuration(engine: Callable[..., Any], tmp_path: Path) -> None:
    from lmcache.v1.config import LMCacheEngineConfig

    from kvist.engines.lmcache import KvistStorage

    written, cartridges = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    path = tmp_path / "lmcache.yaml"
    path.write_text(written + cartridges)
    config = LMCacheEngineConfig.from_file(str(path))
    read = Settings.of_config(config.extra_config, config.storage_plugins, KvistStorage)
    assert read.store == "/srv/kv"
    assert read.max_bytes == 100 << 30
    assert read.cartridges == {"cartridges": [{"cartridge_id": "handbook", "path": "/srv/cartridges/handbook"}]}
    assert config.pre_caching_hash_algorithm == "sha256_cbor"
