"""The commands and the code of docs/guides/transfer.md run, in order, against a bucket of this machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvist.repo import Repository, fsck
from kvist.testing.objects import ObjectServer
from kvist.testing.repo_model import content, manifest_of

PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "transfer.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")
def test_the_guide(moto: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Repository.init((tmp_path / "store").as_uri()) as repo:
        repo.put_pages([content(number) for number in range(6)])
        repo.commit([manifest_of([0, 1, 2])], branch="main")
        repo.commit([manifest_of([0, 1, 2, 3])], branch="main")
        repo.commit([manifest_of([4, 5])], branch="draft")
    (tmp_path / "bin").mkdir()
    for name, command in (
        ("kvist", f'exec {sys.executable} -m kvist "$@"'),
        ("skopeo", f'exec {shutil.which("skopeo")} --insecure-policy "$@"'),  # there is none in a bare machine
    ):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{command}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = os.environ | {
        "BUCKET": moto.new_url(),
        "KVIST_STORE": (tmp_path / "store").as_uri(),
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", "\n".join(blocks("sh"))],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "clean: " in done.stdout
    with Repository.open(environment["BUCKET"]) as bucket:
        assert {ref.name for ref in bucket.refs.all()} == {"main", "draft", "try/0", "try/1", "nightly"}
        assert fsck.check(bucket).is_clean
    with Repository.open(str(tmp_path / "copy")) as copy:
        assert {ref.name for ref in copy.refs.all()} == {"main", "draft", "try/0", "try/1", "nightly"}
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks("python")), "transfer.md", "exec"), {})
