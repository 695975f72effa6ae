"""The commands of docs/guides/object-storage.md run, on a bucket of a real server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from kvist.repo import Repository
from kvist.store import open_store
from kvist.testing.objects import ObjectServer

PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "object-storage.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_commands(moto: ObjectServer, tmp_path: Path) -> None:
    (tmp_path / "kvist").write_text(f'#!/bin/sh\nexec {sys.executable} -m kvist "$@"\n')
    (tmp_path / "kvist").chmod(0o755)
    script = "\n".join(block for block in blocks("sh") if not block.startswith("pip "))
    url = moto.new_url()
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "BUCKET": url}
    done = subprocess.run(["bash", "-euc", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Repository.open(open_store(url)) as repo:
        assert repo.log() == []


def test_the_code(moto: ObjectServer) -> None:
    (code,) = blocks("python")
    url = moto.new_url()
    exec(code.replace("s3://my-bucket/kvist?region=eu-north-1", url), {})
    assert any(info.key == "team-a/kvist.json" for info in open_store(url).list())
