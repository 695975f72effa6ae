"""A vLLM server in its own process tree: started on a free port, asked, and ended politely or with SIGKILL.

Knows vLLM's command line and what its API answers (0.28 to 0.32). Must not know what is asked of it, and never
imports vllm: the interpreter that has it may be another one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, Self

import httpx2

from kvist.errors import EngineError, InvalidInput
from kvist.testing.answers import (
    STREAMED,
    Completion,
    Stream,
    chat_body,
    completion_body,
    named,
    read_answer,
    read_completion,
)
from kvist.testing.processes import kill_tree, tree
from kvist.testing.worker import free_port

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

_BOOT_S: Final = 900.0
_END_S: Final = 60.0
_SILENCE_S: Final = 180.0
"""A server that says nothing for so long hangs."""
_INTERVAL_S: Final = 0.05
_RESULT: Final = "kvist-result:"


class VllmServer:
    """A running vLLM: the API server and its engine and worker processes.

    Attributes:
        url: where it answers, ``http://127.0.0.1:<port>``.
        http: a client for it, to be used from any thread. It has the API key, if there is one.
        pid: the API server's process, leader of a session that holds all the others.
    """

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
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx2.Client(
            base_url=self.url,
            timeout=_SILENCE_S,
            limits=httpx2.Limits(max_connections=None),
            headers={"Authorization": f"Bearer {api_key}"} if api_key is not None else {},
            trust_env=False,
        )
        command = [python or sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--enable-prompt-tokens-details"]
        command += ["--block-size", str(block_size), *(["--dtype", dtype] if dtype else [])]
        command += ["--api-key", api_key] if api_key is not None else []
        if config is not None:
            command += ["--kv-transfer-config", config if isinstance(config, str) else json.dumps(config)]
        wanted: dict[str, str | None] = {**os.environ, **OFFLINE, "VLLM_PLUGINS": "" if config is None else "kvist"}
        wanted |= {**(DETERMINISTIC if deterministic else {}), **(env or {})}
        environ = {name: value for name, value in wanted.items() if value is not None}
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed by the server's end
        self._said = ""
        self._process = subprocess.Popen(
            [*command, *options],
            stdout=self._log,
            stderr=self._log,
            stdin=subprocess.DEVNULL,
            env=environ,
            cwd=cwd,
            start_new_session=True,
        )
        self.pid = self._process.pid

    def wait(self) -> Self:
        """Return when it answers.

        Raises:
            EngineError: it ended instead, or was not up in fifteen minutes; the message is what it printed.
        """
        deadline = time.monotonic() + _BOOT_S
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                if self.http.get("/health").status_code == 200:
                    return self
            except httpx2.TransportError:
                pass
            time.sleep(_INTERVAL_S)
        self.kill()
        raise EngineError(f"vLLM did not come up:\n{self.log}")

    @property
    def log(self) -> str:
        """All that its processes printed; also after its end."""
        if not self._log.closed:
            self._said = os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0).decode(errors="replace")
        return self._said

    def processes(self) -> list[int]:
        """Ids of its living processes."""
        return tree(self.pid)

    def kill(self) -> None:
        """SIGKILL to the whole tree: no handler runs, nothing is flushed. Returns when all of it is gone."""
        kill_tree(self.pid)
        self._close()

    def stop(self) -> None:
        """SIGTERM, and wait for the end; what is left after a minute is killed."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
        self.kill()

    def get(self, path: str) -> dict[str, Any]:
        """A read that must succeed.

        Raises:
            EngineError: any status but 200; the message is the answer.
        """
        return read_answer(self.http.get(path))

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One request, one answer.

        Raises:
            EngineError: any status but 200; the message is the answer.
        """
        return read_answer(self.http.post(path, json=dict(body or {})))

    def complete(self, prompt: Sequence[int] | str | None, *, name: str | None = None, **params: Any) -> Completion:
        """The answer to ``POST /v1/completions``, with log probabilities.

        Args:
            prompt: token ids or text; ``None``: leave it out.
            name: what the client calls the request (``X-Request-Id``).
            **params: further fields of the body.

        Raises:
            EngineError: any status but 200; the message is the answer.
        """
        body = completion_body(prompt, params)
        return read_completion(read_answer(self.http.post("/v1/completions", json=body, headers=named(name))))

    def stream(self, prompt: Sequence[int] | str | None, *, name: str | None = None, **params: Any) -> Stream:
        """As `complete`, but the tokens can be had while they come."""
        body = completion_body(prompt, params) | STREAMED
        return Stream(self.http, "/v1/completions", body, named(name))

    def chat(self, *messages: tuple[str, str], name: str | None = None, **params: Any) -> Completion:
        """The answer to ``POST /v1/chat/completions``, with log probabilities.

        Args:
            *messages: (role, content).
            name: as in `complete`.
            **params: further fields of the body.

        Raises:
            EngineError: any status but 200; the message is the answer.
        """
        body = chat_body(messages, params)
        return read_completion(read_answer(self.http.post("/v1/chat/completions", json=body, headers=named(name))))

    def stream_chat(self, *messages: tuple[str, str], name: str | None = None, **params: Any) -> Stream:
        """As `chat`, but the tokens can be had while they come."""
        return Stream(self.http, "/v1/chat/completions", chat_body(messages, params) | STREAMED, named(name))

    def resume(self, snapshot: str, sequence: str, **params: Any) -> Completion:
        """`complete` a sequence of a snapshot by name, without a prompt."""
        named = {"snapshot": snapshot, "sequence": sequence}
        return self.complete(None, kv_transfer_params=named, **params)

    def _close(self) -> None:
        self._process.wait()
        self.http.close()
        _ = self.log
        self._log.close()

    def __enter__(self) -> Self:
        return self.wait()

    def __exit__(self, *_: object) -> None:
        self.stop()


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
