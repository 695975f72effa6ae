"""A live engine's server in its own process tree: asked over HTTP, and ended politely or with SIGKILL.

Knows processes, and OpenAI's API with kvist's routes beside it. Must not know which engine it is, nor what is asked.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar, Final, Self

import httpx2

from kvist.errors import EngineError
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

_BOOT_S: Final = 900.0
_END_S: Final = 60.0
_INTERVAL_S: Final = 0.05


class LiveServer:
    """A running server. A subclass makes its command line and environment of what a test wants of it.

    Attributes:
        called: the engine, in messages.
        silence_s: a server that says nothing for so long hangs; ``None``: it may be so slow.
        url: where it answers, ``http://127.0.0.1:<port>``.
        http: a client for it, to be used from any thread. It has the API key, if there is one.
        pid: the API server's process, leader of a session that holds all the others.
    """

    called: ClassVar[str] = "the server"
    silence_s: ClassVar[float | None] = 180.0

    def __init__(
        self,
        command: Sequence[str],
        *,
        port: int,
        env: Mapping[str, str | None] | None = None,
        api_key: str | None = None,
        cwd: Path | None = None,
    ) -> None:
        """Start it; it is ready once `wait` returns.

        Args:
            command: the whole command line, which makes it listen at 127.0.0.1.
            port: where.
            env: beside this process's environment; ``None`` takes a variable out.
            api_key: what clients must show.
            cwd: working directory.
        """
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx2.Client(
            base_url=self.url,
            timeout=self.silence_s,
            limits=httpx2.Limits(max_connections=None),
            headers={"Authorization": f"Bearer {api_key}"} if api_key is not None else {},
            trust_env=False,
        )
        wanted: dict[str, str | None] = {**os.environ, **(env or {})}
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed by the server's end
        self._said = ""
        self._process = subprocess.Popen(
            command,
            stdout=self._log,
            stderr=self._log,
            stdin=subprocess.DEVNULL,
            env={name: value for name, value in wanted.items() if value is not None},
            cwd=cwd,
            start_new_session=True,
        )
        self.pid = self._process.pid

    def wait(self) -> Self:
        """Return when it answers. Whoever does not wait to the end leaves no process behind.

        Raises:
            EngineError: it ended instead, or was not up in fifteen minutes; the message is what it printed.
        """
        deadline = time.monotonic() + _BOOT_S
        try:
            while self._process.poll() is None and time.monotonic() < deadline:
                with contextlib.suppress(httpx2.TransportError):
                    if self.http.get("/health").status_code == 200:
                        return self
                time.sleep(_INTERVAL_S)
        except BaseException:
            self.kill()
            raise
        self.kill()
        raise EngineError(f"{self.called} did not come up:\n{self.log}")

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
        """SIGKILL to the whole tree: no handler runs, nothing is flushed. Returns when all are gone. Idempotent."""
        if not self._log.closed:  # its number may be another process's by now
            kill_tree(self.pid)
            self._close()

    def stop(self) -> None:
        """SIGTERM, and wait for the end; what is left after a minute is killed."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
        self.kill()

    # -- asking ----------------------------------------------------------------------------------------------------

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
