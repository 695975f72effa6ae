"""The commands of docs/guides/access.md run, in a directory of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvist.repo import Repository
from kvist.server.tokens import read_tokens

pytest.importorskip("cryptography", reason="the extra `sign` is not installed")

PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "access.md").read_text()


def test_the_commands(tmp_path: Path) -> None:
    (tmp_path / "kvist").write_text(f'#!/bin/sh\nexec {sys.executable} -m kvist "$@"\n')
    (tmp_path / "kvist").chmod(0o755)
    script = "\n".join(re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euc", "umask 077\n" + script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [(token.id, token.tenant) for token in read_tokens(tmp_path / "tokens.json")] == [
        ("ops", None), ("acme-app", "acme"),
    ]  # fmt: skip
    with Repository.open((tmp_path / "store/tenants/acme").as_uri()) as repo:
        assert repo.config.salt and repo.config.quota.max_snapshots == 1000


def test_it_names_every_option_and_variable() -> None:
    for name in ("KVIST_TOKENS", "KVIST_TRUSTED_KEYS", "KVIST_KEY_PASSPHRASE", "--require-signature", "X-Kvist-Token"):
        assert name in PAGE
