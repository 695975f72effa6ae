import os
from pathlib import Path

import pytest

from kvist.errors import NotFound, StoreError
from kvist.store import PrefixStore, Store, open_store
from kvist.testing.objects import ENVIRONMENT, ObjectServer
from kvist.testing.store import StoreTests


class RemoteStoreTests(StoreTests):
    examples = 6

    def reopen(self, store: Store) -> Store:
        return open_store(store.url)


class TestMoto(RemoteStoreTests):
    @pytest.fixture(autouse=True)
    def use(self, moto: ObjectServer) -> None:
        self.server = moto

    def make_store(self, tmp_path: Path) -> Store:
        return open_store(self.server.new_url())


class TestSeaweed(RemoteStoreTests):
    @pytest.fixture(autouse=True)
    def use(self, seaweed: ObjectServer) -> None:
        self.server = seaweed

    def make_store(self, tmp_path: Path) -> Store:
        return open_store(self.server.new_url())


def test_a_forked_child_is_refused(moto: ObjectServer) -> None:
    """The client's threads are not in it: it would wait for ever."""
    store = open_store(moto.new_url())
    store.put("a", b"")
    child = os.fork()
    if not child:
        refused = 0
        for call in (lambda: store.get("a"), lambda: store.put("a", b""), lambda: [*store.list()]):
            try:
                call()
            except StoreError as error:
                refused += "forked" in str(error)
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


def test_a_store_without_prefix_lists_from_the_top(moto: ObjectServer) -> None:
    whole = open_store(f"s3://{moto.bucket}?endpoint={moto.endpoint}")
    part = PrefixStore(whole, "some/where")
    part.put("a/b", b"x")
    assert "some/where/a/b" in [info.key for info in whole.list()]
    assert [info.key for info in open_store(part.url).list()] == ["a/b"]


def test_it_likes_to_be_read_in_large_pieces_by_many(moto: ObjectServer) -> None:
    store = open_store(moto.new_url())
    assert (store.window, store.parallel) == (8 << 20, 16)


def test_secrets_are_in_no_text(moto: ObjectServer) -> None:
    store = open_store(moto.new_url())
    with pytest.raises(NotFound) as caught:
        store.get("a")
    told = f"{store!r} {store.url} {caught.value} {caught.value.__cause__}"
    assert ENVIRONMENT["AWS_ACCESS_KEY_ID"] not in told
    assert ENVIRONMENT["AWS_SECRET_ACCESS_KEY"] not in told
