"""The commands and the code of docs/guides/tiers.md run, in a directory of their own; its urls open what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvist.repo import Repository
from kvist.repo.tier import open_tier
from kvist.testing.repo_model import content, manifest_of

PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "tiers.md").read_text()


def block(language: str, root: Path) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(found).replace("/tmp/", f"{root}/")


def test_the_commands(tmp_path: Path) -> None:
    with Repository.init((tmp_path / "store").as_uri()) as repo:
        repo.put_pages([content(number) for number in range(3)])
        repo.commit([manifest_of([0, 1, 2])], branch="main")
    (tmp_path / "kvist").write_text(f'#!/bin/sh\nexec {sys.executable} -m kvist "$@"\n')
    (tmp_path / "kvist").chmod(0o755)
    environment = os.environ | {
        "BUCKET": (tmp_path / "bucket").as_uri(),
        "KVIST_STORE": (tmp_path / "store").as_uri(),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    subprocess.run(["bash", "-euc", block("sh", tmp_path)], env=environment, check=True)
    assert len([*(tmp_path / "kvist-pages").glob("??/*")]) == 3
    with Repository.open(environment["BUCKET"]) as bucket:
        assert [ref.name for ref in bucket.refs.all()] == ["main"]


def test_the_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block("python", tmp_path), "tiers.md", "exec"), {})
    assert "hits," in capsys.readouterr().out


def test_the_urls() -> None:
    pytest.importorskip("redis")
    urls = re.findall(r"(?:file|rediss?)://[^\s`\"…]+", PAGE)
    assert len(urls) > 5
    for url in urls:
        with open_tier(url) as tier:
            assert tier.url.partition("?")[0] == url.partition("?")[0]
