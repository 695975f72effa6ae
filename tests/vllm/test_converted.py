"""Snapshots converted from the embedded engine to vLLM and back, three families of models, one rank and two."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from vllm_servers import PYTHON, hash_seed, say, watched

from kvist.engines.hf import Engine
from kvist.repo import Repository
from kvist.testing.live import LiveServer
from kvist.testing.scenario import ConvertScenario
from kvist.testing.scenario.converted import story_of
from kvist.testing.vllm import VllmServer

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "convert.md").read_text()


def blocks(language: str) -> str:
    """What the guide has in blocks of a language."""
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL))


class Vllm(ConvertScenario):
    note = staticmethod(say)
    options: ClassVar[tuple[str, ...]] = ("--max-model-len", "8192")

    @classmethod
    def serve(cls, model: Path, store: str, *, company: bool = False) -> LiveServer:
        return watched(VllmServer(model, store, *cls.options, python=PYTHON, env=cls.env(), dtype="float32"))

    @classmethod
    def env(cls) -> dict[str, str]:
        return hash_seed()


class TestLlama(Vllm):
    """Grouped queries; and the guide."""

    def test_the_guide(self, store: str, server: LiveServer, embedded: Callable[[], Engine], tmp_path: Path) -> None:
        """Its commands and its code run, in order."""
        story_of(embedded(), store, 4)
        (tmp_path / "kvist").write_text(f'#!/bin/sh\nexec {sys.executable} -m kvist "$@"\n')
        (tmp_path / "kvist").chmod(0o755)
        done = subprocess.run(
            ["bash", "-euxo", "pipefail", "-c", blocks("sh")],
            cwd=tmp_path,
            env=os.environ | {"U": server.url, "KVIST_STORE": store, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert '"bit_exact":false' in done.stdout and '"cached_tokens":319' in done.stdout
        said = re.sub(r"\b[0-9a-f]{12}\b", "CID", done.stdout)
        for line in blocks("text").splitlines():
            assert re.sub(r"\b[0-9a-f]{12}\b", "CID", line) in said, line
        exec(compile(blocks("python"), "convert.md", "exec"), {"STORE": store})


class TestQwen2(Vllm):
    """Biases, of the keys too."""

    family = "qwen2"


class TestQwen3(Vllm):
    """Keys that are normalised by head."""

    family = "qwen3"


class TestTwoRanks(Vllm):
    """Heads are dealt out to tensor-parallel ranks, and put together again."""

    options = (*Vllm.options, "--tensor-parallel-size", "2")

    @classmethod
    def env(cls) -> dict[str, str]:
        return hash_seed() | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}

    def test_from_the_embedded_engine(self, server: LiveServer, store: str, embedded: Callable[[], Engine]) -> None:
        super().test_from_the_embedded_engine(server, store, embedded)
        with Repository.open(store) as repo:
            assert [manifest.layout.n_heads for manifest in repo.manifests("wrong")] == [2, 2]
