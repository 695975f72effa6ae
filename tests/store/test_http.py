"""A web server as a store to read from: a real WebDAV server, and one that cannot list."""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("obstore")
pytest.importorskip("wsgidav")
pytest.importorskip("cheroot")

from cheroot import wsgi
from wsgidav.wsgidav_app import WsgiDAVApp

from kvist.errors import IntegrityError, NotFound, StoreError
from kvist.repo import Repository
from kvist.store import LocalStore, Range, Store, open_store
from kvist.store.location import Location
from kvist.store.remote import RemoteStore
from kvist.testing.store_races import content


@pytest.fixture
def files(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "files", durable=False)


@pytest.fixture
def web(files: LocalStore, tmp_path: Path) -> Iterator[str]:
    (tmp_path / "files").mkdir(exist_ok=True)
    app = WsgiDAVApp(
        {
            "provider_mapping": {"/repo": str(tmp_path / "files")},
            "simple_dc": {"user_mapping": {"*": True}},
            "dir_browser": {"enable": False},
            "property_manager": False,
            "lock_storage": False,
            "verbose": 0,
            "logging": {"enable": False},
        }
    )
    server = wsgi.Server(("127.0.0.1", 0), app)
    server.prepare()
    thread = threading.Thread(target=server.serve)
    thread.start()
    yield f"http://127.0.0.1:{server.bind_addr[1]}/repo"
    server.stop()
    thread.join()


@pytest.fixture
def store(web: str) -> Iterator[Store]:
    with open_store(web) as store:
        yield store


def test_it_reads_what_lies_there(store: Store, files: LocalStore) -> None:
    data = content(300_000)
    files.put("a/b", data)
    assert store.get("a/b") == data
    assert store.get("a/b", start=299_990) == data[-10:]
    assert store.get("a/b", start=10, size=5) == data[10:15]
    assert store.get("a/b", start=300_000) == b""
    out = memoryview(bytearray(30))
    store.get_ranges("a/b", [Range(5, out[:10]), Range(20, out[10:20]), Range(299_990, out[20:])])
    assert bytes(out) == data[5:15] + data[20:30] + data[-10:]
    with pytest.raises(IntegrityError):
        store.get_ranges("a/b", [Range(299_999, memoryview(bytearray(2)))])
    for key in ("nope", "a/nope", "nope/nope"):
        assert store.head(key) is None
        with pytest.raises(NotFound):
            store.get(key)


def test_it_lists_in_order(store: Store, files: LocalStore) -> None:
    keys = ["a-b", "a.b", "a/b", "a/c/d", "a0", "b/a.c", "b/a/c"]
    for key in keys:
        files.put(key, key.encode())
    files.delete(["a0"])  # leaves a lock file, which is no object
    infos = [*store.list()]
    assert [(info.key, info.size) for info in infos] == [(key, len(key)) for key in sorted(keys) if key != "a0"]
    assert [info.key for info in store.list("a/")] == ["a/b", "a/c/d"]
    assert [*store.list("nope/")] == []
    assert all(store.head(info.key).modified == info.modified for info in infos)


def test_it_refuses_to_write(store: Store, files: LocalStore) -> None:
    for write in (
        lambda: store.put("a", b""),
        lambda: store.put_many([("a", b"")], mode="create"),
        lambda: store.writer("a"),
        lambda: store.delete(["a"]),
    ):
        with pytest.raises(StoreError, match="read only"):
            write()
    assert [*files.list()] == []


def test_a_repository_can_be_read_over_the_web(store: Store, files: LocalStore) -> None:
    pages = [content(5000, seed) for seed in range(20)]
    with Repository.init(files) as repo:
        digests = repo.put_pages(pages).digests
    with Repository.open(store) as repo:
        outs = [bytearray(5000) for _ in pages]
        repo.get_pages(digests, [memoryview(out) for out in outs])
    assert outs == pages


@contextmanager
def plain_server(directory: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(directory))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_server_that_cannot_list_or_give_ranges(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"whole")
    with plain_server(tmp_path) as url:
        store = RemoteStore(Location.parse(url), retry_for=0.2, idle=1)
        assert store.get("a") == b"whole"
        with pytest.raises(StoreError, match="cannot list everything in http"):
            [*store.list()]
        with pytest.raises(StoreError, match="does not support"):
            store.get("a", start=1)


def test_nobody_there() -> None:
    store = RemoteStore(Location.parse("http://127.0.0.1:9/x"), retry_for=0.2, idle=0.2)
    with pytest.raises(StoreError, match="cannot read a in http"):
        store.get("a")
