import errno
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvist.errors import AlreadyExists, IntegrityError, NotFound, StoreError, StoreFull
from kvist.store import LocalStore, Match, Range, Store, open_store, staging
from kvist.testing.store import StoreTests, content

from . import processes

MIB = 1 << 20


class LocalStoreTests(StoreTests):
    def reopen(self, store: Store) -> Store:
        return open_store(store.url)


class TestDurable(LocalStoreTests):
    def make_store(self, tmp_path: Path) -> Store:
        return LocalStore(tmp_path / "not" / "yet" / "there")


class TestNotDurable(LocalStoreTests):
    def make_store(self, tmp_path: Path) -> Store:
        return LocalStore(tmp_path / "s", durable=False)


class TestWithoutDirectIO(LocalStoreTests):
    """A file system that takes O_DIRECT at open and refuses it at the write, as some network ones do."""

    @pytest.fixture(autouse=True)
    def refuse(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import fcntl

        real = os.pwrite

        def pwrite(fd: int, data: memoryview, offset: int) -> int:
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return real(fd, data[: 5 * MIB + 3], offset)  # and writes short

        monkeypatch.setattr(staging.os, "pwrite", pwrite)

    def make_store(self, tmp_path: Path) -> Store:
        return LocalStore(tmp_path / "s", durable=False)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore(tmp_path / "s") as store:
        yield store


def files_below(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


# -- a full disk -------------------------------------------------------------------------------------------------


WRITES: dict[str, Callable[[Store, int], object]] = {
    "create": lambda store, size: store.put("big/1", bytes(size), mode="create"),
    "overwrite": lambda store, size: store.put("old", bytes(size)),
    "match": lambda store, size: store.put("old", bytes(size), mode=Match(store.head("old").etag)),
    "put_many": lambda store, size: store.put_many([("big/1", bytes(size)), ("big/2", bytes(size))], mode="create"),
    "writer": lambda store, size: _write(store, size),
}


def _write(store: Store, size: int) -> None:
    with store.writer("big/1") as writer:
        for start in range(0, size, MIB):
            writer.write(bytes(min(MIB, size - start)))
        writer.commit()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "kvist-test", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip("may not mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("how", WRITES)
def test_a_disk_that_is_full(tiny_disk: Path, how: str) -> None:
    store = LocalStore(tiny_disk / "s")
    store.put("old", b"unchanged")
    for size in (5 * MIB, 70 * MIB):
        with pytest.raises(StoreFull, match="No space left"):
            WRITES[how](store, size)
        assert files_below(tiny_disk / "s") in (["old"], [".lock", "old"])
        assert store.get("old") == b"unchanged"
    store.put("fits", bytes(3 * MIB))


CALLS = [
    *((how, call) for how in WRITES if how != "writer" for call in ("write", "fdatasync")),
    *(("writer", call) for call in ("pwrite", "ftruncate", "fdatasync")),
]


@pytest.mark.parametrize(("how", "call"), CALLS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_call_that_fails(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, call: str, number: int
) -> None:
    store.put("old", b"unchanged")

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StoreError) as caught:
            WRITES[how](store, 30 * MIB + 1 if how == "writer" else 1000)
    assert isinstance(caught.value, StoreFull) == (number != errno.EIO)
    assert os.strerror(number) in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert files_below(tmp_path / "s") in (["old"], [".lock", "old"])
    assert store.get("old") == b"unchanged"
    WRITES[how](store, 1000)


# -- a disk that cannot read -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.EACCES])
def test_bytes_that_the_disk_cannot_read_are_damage(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store.put("a", b"12345")

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pread", fail)
    monkeypatch.setattr(os, "preadv", fail)
    kind = StoreError if number == errno.EACCES else IntegrityError
    with pytest.raises(kind, match=os.strerror(number)):
        store.get("a")
    with pytest.raises(kind, match=os.strerror(number)):
        store.get_ranges("a", [Range(0, memoryview(bytearray(5)))])


# -- durability ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("how", ["create", "put_many", "writer"])
def test_every_new_directory_is_synced_into_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, durable: bool
) -> None:
    synced, fsync = set(), os.fsync

    def record(fd: int) -> None:
        synced.add(str(Path(f"/proc/self/fd/{fd}").readlink()))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", record)
    WRITES[how](LocalStore(tmp_path / "new" / "root", durable=durable), 10)
    wanted = {str(tmp_path / each) for each in ("", "new", "new/root", "new/root/big")}
    assert synced == (wanted if durable else set())


# -- places that cannot be written -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", WRITES)
def test_a_root_that_is_a_file(tmp_path: Path, how: str) -> None:
    (tmp_path / "file").write_text("not a directory")
    store = LocalStore(tmp_path / "file")
    assert store.head("old") is None
    assert [*store.list()] == []
    if how != "match":
        with pytest.raises(StoreError, match=f"{tmp_path}/file.*: (Not a directory|File exists)"):
            WRITES[how](store, 10)


def test_a_read_only_file_system(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("a", b"x")
    real = os.open

    def refuse(path: object, flags: int, *rest: int, **named: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StoreError, match="Read-only file system"):
        store.put("b", b"x")
    with pytest.raises(StoreError, match="Read-only file system"):
        store.writer("b")
    with pytest.raises(StoreError, match="Read-only file system"):
        store.delete(["a"])
    store.delete(["b"])
    assert store.get("a") == b"x"


def test_a_key_and_a_directory_of_one_name(store: LocalStore) -> None:
    store.put("a/b", b"x")
    store.put("f", b"x")
    for mode in ("create", "overwrite"):
        with pytest.raises(StoreError):
            store.put("a", b"y", mode=mode)
        with pytest.raises(StoreError):
            store.put("f/g", b"y", mode=mode)
    with pytest.raises(StoreError), store.writer("a") as writer:
        writer.commit()
    assert [(info.key, info.size) for info in store.list()] == [("a/b", 1), ("f", 1)]


# -- other things in the directory -------------------------------------------------------------------------------


def test_strangers_are_no_objects(store: LocalStore, tmp_path: Path) -> None:
    store.put("a/b", b"x")
    (tmp_path / "outside").write_text("secret")
    root = tmp_path / "s"
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "a" / "up").symlink_to(tmp_path)
    (root / "a" / ".hidden").write_text("")
    (root / "with space").write_text("")
    (root / "ä").write_text("")
    (root / os.fsdecode(b"\xff")).write_text("")
    os.mkfifo(root / "pipe")
    (root / "empty").mkdir()
    assert [info.key for info in store.list()] == ["a/b"]
    for key in ("link", "pipe", "empty"):
        assert store.head(key) is None
        with pytest.raises(NotFound):
            store.get(key)
    store.delete(["link", "pipe", "empty"])
    assert (tmp_path / "outside").read_text() == "secret"
    assert os.path.lexists(root / "link")


def test_a_file_cut_short_under_us(store: LocalStore, tmp_path: Path) -> None:
    store.put("a", content(3 * MIB))
    os.truncate(tmp_path / "s" / "a", 2 * MIB + 7)
    out = memoryview(bytearray(3 * MIB))
    with pytest.raises(IntegrityError, match=rf"a ends early: wanted {MIB - 7} bytes at {2 * MIB + 7}"):
        store.get_ranges("a", [Range(i * MIB, out[i * MIB : (i + 1) * MIB]) for i in range(3)])


def test_short_reads_are_continued(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    data = content(100_000)
    store.put("a", data)
    preadv, pread = os.preadv, os.pread

    def short(fd: int, buffers: list[memoryview], start: int) -> int:
        return preadv(fd, [buffers[0][:777]], start)

    monkeypatch.setattr(os, "preadv", short)
    monkeypatch.setattr(os, "pread", lambda fd, size, start: pread(fd, min(size, 777), start))
    out = memoryview(bytearray(100_000))
    store.get_ranges("a", [Range(0, out[:50_000]), Range(50_000, out[50_000:50_001]), Range(50_001, out[50_001:])])
    assert out == data
    assert store.get("a", start=3, size=90_000) == data[3:90_003]


# -- several processes, and death --------------------------------------------------------------------------------


def test_processes_lose_no_update(store: LocalStore, tmp_path: Path) -> None:
    store.put("refs/n", b"0")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=processes.count_up, args=(tmp_path / "s", 50)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert store.get("refs/n") == b"100"


@pytest.mark.parametrize("how", ["writer", "put"])
def test_kill_while_writing(store: LocalStore, tmp_path: Path, how: str) -> None:
    died = subprocess.run([sys.executable, processes.__file__, "die_writing", str(tmp_path / "s"), how], check=False)
    assert died.returncode == -signal.SIGKILL
    assert [*store.list()] == []
    assert store.head("segments/1") is None
    (left,) = (tmp_path / "s" / ".tmp").iterdir()
    size = left.stat().st_size
    assert size >= MIB
    assert store.clean(3600) == 0, "too young"
    assert store.clean(0) == size
    assert not left.exists()
    store.put("segments/1", b"again", mode="create")


def test_clean_spares_who_still_writes(store: LocalStore, tmp_path: Path) -> None:
    command = [sys.executable, processes.__file__, "hold_writer", str(tmp_path / "s")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        (unfinished,) = (tmp_path / "s" / ".tmp").iterdir()
        os.utime(unfinished, (0, 0))
        assert store.clean(3600) == 0
        process.communicate("\n")
    assert process.returncode == 0
    assert store.get("segments/1") == b"slow"
    assert files_below(tmp_path / "s") == ["segments/1"]


def test_clean_after_a_crash_between_link_and_unlink(store: LocalStore, tmp_path: Path) -> None:
    store.put("a", b"123")
    left = tmp_path / "s" / ".tmp" / "left"
    left.hardlink_to(tmp_path / "s" / "a")
    assert store.clean(0) == 0, "the bytes live on in the object"
    assert not left.exists()
    assert store.get("a") == b"123"


# -- staging buffers ---------------------------------------------------------------------------------------------


def test_staging_buffers_are_reused_and_never_shared(store: LocalStore) -> None:
    first, second = content(40 * MIB, 1), content(40 * MIB, 2)
    for turn in range(2):
        with store.writer(f"a/{turn}") as one, store.writer(f"b/{turn}") as two:
            for start in range(0, 40 * MIB, 3 * MIB):
                one.write(first[start : start + 3 * MIB])
                two.write(second[start : start + 3 * MIB])
            two.commit()
            one.commit()
        assert store.get(f"a/{turn}") == first
        assert store.get(f"b/{turn}") == second
    free = store._pool._free
    assert 2 <= len(free) <= 6
    assert len({id(buffer.obj) for buffer in free}) == len(free)
    store.close()
    assert store._pool._free == []
    store.put("still", b"open")


def test_a_lost_race_leaves_nothing(store: LocalStore, tmp_path: Path) -> None:
    store.put("a", b"x")
    with pytest.raises(AlreadyExists):
        store.put("a", b"y", mode="create")
    with pytest.raises(AlreadyExists), store.writer("a") as writer:
        writer.write(bytes(20 * MIB))
        writer.commit()
    assert files_below(tmp_path / "s") == [".lock", "a"]
