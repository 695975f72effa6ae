"""An SGLang server under test. Knows SGLang's command line (0.5.23); never imports sglang: the interpreter that has it
may be another one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from kvist.testing.live import LiveServer
from kvist.testing.processes import free_port

CPU: Final = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "HF_HUB_OFFLINE": "1",
    # What is compiled by inductor on first use takes longer than all else.
    "TORCHDYNAMO_DISABLE": "1",
}
"""Environment of a server on a CPU that is up soon and needs no network."""

ON_CPU: Final = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--grammar-backend", "none", "--disable-cuda-graph", "--skip-server-warmup"),
)
"""Options of a server on a CPU."""


class SglangServer(LiveServer):
    """A running SGLang: the API server, its scheduler and its detokenizer."""

    called = "SGLang"

    def __init__(
        self,
        model: Path,
        store: str | None = None,
        *options: str,
        python: str | None = None,
        dtype: str = "float32",
        page_size: int = 1,
        deterministic: bool = False,
        tokens: int = 16384,
        settings: Mapping[str, Any] | None = None,
        api_key: str | None = None,
        env: Mapping[str, str | None] | None = None,
        shims: Path | None = None,
        cwd: Path | None = None,
    ) -> None:
        """Start it; it is ready once `wait` returns.

        Args:
            model: the model's directory.
            store: url of kvist's repository; ``None``: an SGLang without kvist.
            *options: further options of SGLang's command line.
            python: interpreter that has sglang and kvist; default: this one.
            dtype: what SGLang computes in.
            page_size: tokens of a page.
            deterministic: what a request computes does not depend on those beside it, and seeds decide what is drawn.
            tokens: room of the KV cache.
            settings: further keys of ``KVIST_SGLANG``.
            api_key: what clients must show.
            env: further environment; ``None`` takes a variable out.
            shims: directory of modules that stand in for those that a CPU has not.
            cwd: working directory, from which paths are understood.
        """
        port = free_port()
        command = [python or sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(port), *ON_CPU, "--dtype", dtype]
        command += ["--page-size", str(page_size), "--max-total-tokens", str(tokens), "--enable-cache-report"]
        command += ["--enable-deterministic-inference"] if deterministic else []
        command += ["--api-key", api_key] if api_key is not None else []
        chosen = None if store is None else json.dumps({"store": store, **(settings or {})})
        wanted: dict[str, str | None] = {**CPU, "KVIST_SGLANG": chosen, "SGLANG_PLUGINS": "kvist", **(env or {})}
        if shims is not None:
            inherited = wanted.get("PYTHONPATH", os.environ.get("PYTHONPATH"))
            wanted["PYTHONPATH"] = ":".join([str(shims), *filter(None, [inherited])])
        super().__init__([*command, *options], port=port, env=wanted, api_key=api_key, cwd=cwd)
