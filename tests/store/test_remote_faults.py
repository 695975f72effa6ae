"""The network's bad days, between a real client and a real server: each is passed over, or told as a typed error."""

import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

pytest.importorskip("obstore")

from kvist.errors import AlreadyExists, Conflict, InvalidInput, KvistError, NotFound, StoreError, StoreFull
from kvist.store import Match, PutMode, Range, Store, open_store
from kvist.store.location import Location
from kvist.store.remote import RemoteStore
from kvist.testing.objects import ENVIRONMENT, ObjectServer
from kvist.testing.proxy import Fault, FaultyProxy
from kvist.testing.store_races import content

MIB = 1 << 20


@pytest.fixture
def location(moto: ObjectServer) -> Location:
    return Location.parse(moto.new_url())


@pytest.fixture
def direct(location: Location) -> Iterator[Store]:
    """The same place without the proxy."""
    with RemoteStore(location) as store:
        yield store


@pytest.fixture
def proxy(moto: ObjectServer) -> Iterator[FaultyProxy]:
    with FaultyProxy(moto.endpoint) as proxy:
        yield proxy


@pytest.fixture
def store(location: Location, proxy: FaultyProxy) -> Iterator[Store]:
    with RemoteStore(replace(location, endpoint=proxy.endpoint), retry_for=20, idle=20) as store:
        yield store


@pytest.fixture
def impatient(location: Location, proxy: FaultyProxy) -> Iterator[Store]:
    with RemoteStore(replace(location, endpoint=proxy.endpoint), retry_for=0.3, idle=1) as store:
        yield store


def write_parts(store: Store, key: str, size: int) -> None:
    with store.writer(key) as writer:
        for start in range(0, size, MIB):
            writer.write(content(size)[start : start + MIB])
        writer.commit()


def read_parts(store: Store, size: int) -> bytes:
    out = bytearray(size)
    store.get_ranges("there", [Range(0, memoryview(out))])
    return bytes(out)


ACTS: dict[str, Callable[[Store], object]] = {
    "get": lambda store: store.get("there"),
    "get_ranges": lambda store: read_parts(store, 300_000),
    "head": lambda store: store.head("there"),
    "list": lambda store: [*store.list()],
    "overwrite": lambda store: store.put("there", b"new"),
    "create": lambda store: store.put("new", b"new", mode="create"),
    "match": lambda store: store.put("there", b"new", mode=Match(store.head("there").etag)),
    "put_many": lambda store: store.put_many([("new", b"1"), ("newer", b"2")], mode="create"),
    "writer": lambda store: write_parts(store, "new", 10 * MIB),
    "delete": lambda store: store.delete(["there"]),
}
WRITES = ("overwrite", "create", "match", "writer", "delete")


@pytest.mark.parametrize("fault", [Fault.REFUSE, Fault.UNAVAILABLE, Fault.LOSE_ANSWER, Fault.FAIL_AFTER])
@pytest.mark.parametrize("act", ACTS)
def test_what_passes_is_passed_over(store: Store, direct: Store, proxy: FaultyProxy, act: str, fault: Fault) -> None:
    """The first three requests go wrong; also a conditional put that the server did and whose answer was lost."""
    direct.put("there", content(300_000))
    proxy.fail_first(3, fault)
    ACTS[act](store)
    if act in ("overwrite", "match"):
        assert direct.get("there") == b"new"
    elif act in ("create", "writer"):
        assert direct.head("new").size == (3 if act == "create" else 10 * MIB)
    elif act == "delete":
        assert direct.head("there") is None


@pytest.mark.parametrize("act", ["get", "get_ranges"])
def test_cut_bodies_are_completed(store: Store, direct: Store, proxy: FaultyProxy, act: str) -> None:
    data = content(300_000)
    direct.put("there", data)
    proxy.fail_first(2, Fault.CUT, "GET")
    assert ACTS[act](store) == data


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("fault", [Fault.REFUSE, Fault.UNAVAILABLE])
def test_what_does_not_pass_is_a_store_error_in_bounded_time(
    impatient: Store, direct: Store, proxy: FaultyProxy, act: str, fault: Fault
) -> None:
    direct.put("there", b"old")
    proxy.rule = lambda request: fault
    with pytest.raises(StoreError) as caught:
        ACTS[act](impatient)
    assert impatient.url in str(caught.value)
    proxy.rule = lambda request: None
    assert [info.key for info in direct.list()] == ["there"]
    assert direct.get("there") == b"old"


@pytest.fixture
def brisk(location: Location, proxy: FaultyProxy) -> Iterator[Store]:
    """Its limits stand to each other as the defaults do: an attempt may stall for longer than it is tried again."""
    with RemoteStore(replace(location, endpoint=proxy.endpoint), retry_for=0.5, idle=1, timeout=3) as store:
        yield store


@pytest.mark.parametrize("act", ACTS)
def test_a_server_that_stalls_is_asked_again(brisk: Store, direct: Store, proxy: FaultyProxy, act: str) -> None:
    direct.put("there", content(300_000))
    proxy.fail_first(1, Fault.STALL)
    ACTS[act](brisk)
    assert len(proxy.seen) > 1


@pytest.mark.parametrize("act", ["get", "get_ranges"])
def test_an_answer_that_stalls_is_completed(brisk: Store, direct: Store, proxy: FaultyProxy, act: str) -> None:
    data = content(300_000)
    direct.put("there", data)
    proxy.fail_first(1, Fault.STALL_HALFWAY, "GET")
    assert ACTS[act](brisk) == data


@pytest.mark.parametrize("mode", ["overwrite", "create"])
def test_sending_a_big_body_may_take_longer_than_an_answer(
    brisk: Store, direct: Store, proxy: FaultyProxy, mode: PutMode
) -> None:
    proxy.rule = lambda request: time.sleep(1.5)
    brisk.put("new", content(2 * MIB), mode=mode)
    assert [request.method for request in proxy.seen] == ["PUT"]
    assert direct.get("new") == content(2 * MIB)


def test_what_is_refused_at_once_is_tried_for_a_while(location: Location, direct: Store, proxy: FaultyProxy) -> None:
    direct.put("there", b"x")
    with RemoteStore(replace(location, endpoint=proxy.endpoint)) as store:
        proxy.fail_first(12, Fault.UNAVAILABLE)
        assert store.get("there") == b"x"


@pytest.mark.parametrize("limit", ["retry_for", "idle", "timeout"])
def test_limits_are_above_zero(location: Location, limit: str) -> None:
    for seconds in (0.0, -1.0, float("nan")):
        with pytest.raises(InvalidInput, match=limit):
            RemoteStore(location, **{limit: seconds})


def test_no_server_at_all(location: Location) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    store = RemoteStore(replace(location, endpoint=endpoint), retry_for=0.5, idle=0.5)
    began = time.monotonic()
    for act in ("get", "create", "list"):
        with pytest.raises(StoreError, match="127"):
            ACTS[act](store)
    assert time.monotonic() - began < 300, "retries must end"


# -- who wrote? ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [Fault.LOSE_ANSWER, Fault.FAIL_AFTER])
def test_a_lost_answer_never_hides_another_writer(
    store: Store, direct: Store, proxy: FaultyProxy, fault: Fault
) -> None:
    """Equal bytes are not enough to be ours: the other wrote the same."""
    direct.put("new", b"new", mode="create")
    proxy.fail_first(1, fault, "PUT")
    with pytest.raises(AlreadyExists):
        store.put("new", b"new", mode="create")
    etag = direct.head("new").etag
    direct.put("new", b"newer", mode=Match(etag))
    proxy.fail_first(1, fault, "PUT")
    with pytest.raises(Conflict):
        store.put("new", b"newer", mode=Match(etag))


def test_a_lost_end_of_an_upload(store: Store, direct: Store, proxy: FaultyProxy) -> None:
    """The parts are there and joined; only that was not heard."""
    for fault in (Fault.LOSE_ANSWER, Fault.FAIL_AFTER):
        proxy.fail_first(1, fault, "POST", "uploadId")
        write_parts(store, f"new/{fault.name}", 10 * MIB)
        assert direct.get(f"new/{fault.name}") == content(10 * MIB)


# -- what will not pass --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ACTS)
def test_a_refusal_says_which_variables_and_no_secret(
    store: Store, direct: Store, proxy: FaultyProxy, act: str
) -> None:
    direct.put("there", content(300_000))
    proxy.rule = lambda request: Fault.FORBIDDEN
    with pytest.raises(StoreError) as caught:
        ACTS[act](store)
    error = caught.value
    assert "AWS_ACCESS_KEY_ID" in (error.hint or "")
    assert "403" in str(error)
    assert error.__cause__ is None
    told = f"{error} {error.hint} {error.__cause__}"
    assert not [secret for secret in ENVIRONMENT.values() if secret in told and secret != "us-east-1"]
    assert "Signature" not in told


@pytest.mark.parametrize("act", ["overwrite", "create", "match", "put_many", "writer"])
def test_no_space(impatient: Store, direct: Store, proxy: FaultyProxy, act: str) -> None:
    direct.put("there", b"old")
    proxy.rule = lambda request: Fault.FULL if request.method in ("PUT", "POST") else None
    with pytest.raises(StoreFull):
        ACTS[act](impatient)
    proxy.rule = lambda request: None
    assert [(info.key, info.size) for info in direct.list()] == [("there", 3)]


def test_a_part_that_is_refused_discards_the_upload(
    store: Store, direct: Store, proxy: FaultyProxy, location: Location
) -> None:
    proxy.rule = lambda request: Fault.FORBIDDEN if "partNumber=2" in request.target else None
    with pytest.raises(StoreError, match="403"):
        write_parts(store, "new", 30 * MIB)
    assert direct.head("new") is None
    assert unfinished(location) == []


def test_an_aborted_upload_leaves_nothing(store: Store, location: Location, proxy: FaultyProxy) -> None:
    with pytest.raises(ZeroDivisionError), store.writer("new") as writer:
        writer.write(bytes(30 * MIB))
        raise ZeroDivisionError
    assert any("uploadId" in request.target for request in proxy.seen), "nothing was under way"
    assert unfinished(location) == []
    assert store.head("new") is None


def unfinished(location: Location) -> list[str]:
    import boto3

    client = boto3.client("s3", endpoint_url=location.endpoint)
    found = client.list_multipart_uploads(Bucket=location.bucket).get("Uploads", [])
    client.close()
    return [each["Key"] for each in found if each["Key"].startswith(location.prefix)]


def test_a_bucket_that_is_not_there(location: Location) -> None:
    store = RemoteStore(replace(location, bucket="no-such-bucket"))
    for act in (
        lambda: store.put("a", b""),
        lambda: store.put("a", b"", mode="create"),
        lambda: [*store.list()],
        lambda: write_parts(store, "a", 10 * MIB),
    ):
        with pytest.raises(StoreError, match="there is no bucket no-such-bucket"):
            act()
    with pytest.raises(KvistError):
        store.get("a")


def test_no_credentials(moto: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any, the machine's role is asked for them: where there is none, the error says what to set."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name)
    with FaultyProxy(moto.endpoint) as role:
        role.rule = lambda request: Fault.FORBIDDEN
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", role.endpoint)
        store = RemoteStore(Location.parse(moto.new_url()), retry_for=0.5, idle=0.5)
        with pytest.raises(StoreError) as caught:
            store.put("a", b"x")
    assert "AWS_ACCESS_KEY_ID" in (caught.value.hint or "")


def test_it_says_what_it_cannot_find(store: Store) -> None:
    with pytest.raises(NotFound, match="has no object a/b"):
        store.get("a/b")
    assert open_store(store.url) == store
