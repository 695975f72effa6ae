"""The configuration of docs/guides/hicache.md, read by the backend and by SGLang."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from hicache_real import HAS_SGLANG, load

from kvist.engines.sglang import hicache
from kvist.engines.sglang.hicache_settings import Settings

PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "hicache.md").read_text()


def written() -> dict[str, object]:
    (text,) = re.findall(r"^```json\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    read = json.loads(text)
    assert isinstance(read, dict)
    return read


def test_the_table_names_every_option() -> None:
    table = PAGE.partition("| option |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(Settings.__dataclass_fields__)


def test_the_configuration() -> None:
    config = written()
    assert config["module_path"] == hicache.__name__
    assert getattr(hicache, str(config["class_name"])) is hicache.KvistHiCache
    read = Settings.of_config(config)
    assert (read.store, read.max_bytes) == ("file:///srv/kv", 100 << 30)


@pytest.mark.skipif(not HAS_SGLANG, reason="sglang is not installed here: make test-sglang")
def test_the_command_line() -> None:
    (script,) = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    given = {word.removeprefix("--").replace("-", "_") for word in shlex.split(script) if word.startswith("--")}
    assert given <= set(load("server_args").ServerArgs.__struct_fields__)
