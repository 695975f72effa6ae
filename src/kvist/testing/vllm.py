"""A vLLM server under test, and pieces of Python in an interpreter that has vLLM.

Knows vLLM's command line (0.28 to 0.32). Must not know what is asked of it, and never imports vllm: the interpreter
that has it may be another one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from kvist.errors import EngineError, InvalidInput
from kvist.testing.live import LiveServer
from kvist.testing.processes import free_port

OFFLINE: Final = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Logprobs would be compiled by inductor on first use, which takes longer than all else (vllm 0.32).
    "TORCHDYNAMO_DISABLE": "1",
}
"""Environment of a server that is up soon and needs no network."""

DETERMINISTIC: Final = {"VLLM_CPU_ATTN_SPLIT_KV": "0", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""Environment under which a CPU computes a request alike, whatever others run beside it. Slow for wide models."""

IN_PROCESS: Final = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""Further environment of an engine within the process that asks it."""

_RESULT: Final = "kvist-result:"


class VllmServer(LiveServer):
    """A running vLLM: the API server and its engine and worker processes."""

    called = "vLLM"

    def __init__(
        self,
        model: Path,
        store: str | None = None,
        *options: str,
        python: str | None = None,
        dtype: str | None = None,
        block_size: int = 32,
        deterministic: bool = False,
        settings: Mapping[str, Any] | None = None,
        transfer: Mapping[str, Any] | None = None,
        api_key: str | None = None,
        env: Mapping[str, str | None] | None = None,
        config: Mapping[str, Any] | str | None = None,
        cwd: Path | None = None,
    ) -> None:
        """Start it; it is ready once `wait` returns.

        Args:
            model: the model's directory.
            store: url of kvist's repository; ``None``: a vLLM without kvist.
            *options: further options of vLLM's command line.
            python: interpreter that has vllm and kvist; default: this one.
            dtype: what vLLM computes in; default: its own choice, which for float32 weights is half precision.
            block_size: tokens of a block.
            deterministic: run under `DETERMINISTIC`.
            settings: further keys of ``kv_connector_extra_config``.
            transfer: further keys of the ``--kv-transfer-config``, e.g. ``kv_load_failure_policy``.
            api_key: what clients must show.
            env: further environment; ``None`` takes a variable out.
            config: the whole ``--kv-transfer-config``, as it is or as text, in place of the one that ``store``,
                ``settings`` and ``transfer`` describe.
            cwd: working directory, from which paths in a configuration are understood.

        Raises:
            InvalidInput: a store and a configuration.
        """
        if config is not None and store is not None:
            raise InvalidInput("expected a store or a whole configuration, got both")
        if config is None and store is not None:
            config = transfer_config(store, settings, transfer)
        port = free_port()
        command = [python or sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--enable-prompt-tokens-details"]
        command += ["--block-size", str(block_size), *(["--dtype", dtype] if dtype else [])]
        command += ["--api-key", api_key] if api_key is not None else []
        if config is not None:
            command += ["--kv-transfer-config", config if isinstance(config, str) else json.dumps(config)]
        wanted: dict[str, str | None] = {**OFFLINE, "VLLM_PLUGINS": "" if config is None else "kvist"}
        wanted |= {**(DETERMINISTIC if deterministic else {}), **(env or {})}
        super().__init__([*command, *options], port=port, env=wanted, api_key=api_key, cwd=cwd)


def transfer_config(
    store: str, settings: Mapping[str, Any] | None = None, transfer: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The ``--kv-transfer-config`` of a vLLM with kvist.

    Args:
        store: url of the repository.
        settings: further keys of ``kv_connector_extra_config``.
        transfer: further keys beside it.
    """
    return {
        "kv_connector": "KvistConnector",
        "kv_connector_module_path": "kvist.engines.vllm.connector",
        "kv_role": "kv_both",
        **(transfer or {}),
        "kv_connector_extra_config": {"store": store, **(settings or {})},
    }


def run_in_process(
    script: str, *arguments: Any, python: str | None = None, env: Mapping[str, str] | None = None
) -> Any:
    """Run a piece of Python in an interpreter that has vLLM, with the engine in the same process: far sooner up.

    The script finds ``arguments``, ``emit(value)`` (which returns the value, as JSON, from here), and ``make_llm(model,
    **settings)`` (which makes a small ``vllm.LLM``; ``store=url`` makes it one with kvist, ``config={...}`` one with
    any ``--kv-transfer-config``).

    Args:
        script: the source.
        *arguments: what JSON can say.
        python: the interpreter; default: this one.
        env: further environment.

    Raises:
        EngineError: it failed, or emitted nothing; the message is what it printed.
    """
    plugins = {"VLLM_PLUGINS": "kvist"}
    ran = subprocess.run(
        [python or sys.executable, "-c", _PRELUDE + script, json.dumps(arguments)],
        env={**os.environ, **OFFLINE, **IN_PROCESS, **plugins, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    emitted = [line for line in ran.stdout.splitlines() if line.startswith(_RESULT)]
    if ran.returncode or not emitted:
        raise EngineError(f"the script ended with status {ran.returncode}:\n{ran.stdout}")
    return json.loads(emitted[-1].removeprefix(_RESULT))


_PRELUDE: Final = f"""
import json as _json, sys as _sys
arguments = _json.loads(_sys.argv[1])
def emit(value):
    print("\\n{_RESULT}" + _json.dumps(value), flush=True)
def make_llm(model, store=None, config=None, **settings):
    from vllm import LLM
    if config is not None:
        settings["kv_transfer_config"] = config
    if store is not None:
        from kvist.testing.vllm import transfer_config
        settings["kv_transfer_config"] = transfer_config(store)
    common = dict(enforce_eager=True, block_size=32, kv_cache_memory_bytes=64 << 20, max_model_len=2048,
                  distributed_executor_backend="uni", disable_log_stats=True)
    return LLM(model, **(common | settings))
"""
