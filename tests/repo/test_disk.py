"""A disk that is full, and one that takes no writes: real ones, where this machine lets a test mount them.

Where it does not, a limit on the size of files and a store that is read only stand in for them.
"""

import contextlib
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvist.errors import KvistError, StoreError, StoreFull
from kvist.repo import RefKind, Repository, fsck, gc
from kvist.store import LocalStore, ReadOnlyStore, Store

from .making import halves, read_back, snapshot
from .operations import OPERATIONS, save, world
from .worlds import assert_nothing_lost, learn

SIZE = 2 << 20
"""Bytes of the small disks."""
LITTLE = 16 << 10
"""Bytes that a gc needs to begin with."""
BIG = [bytes([seed]) * (64 << 10) for seed in range(160)]
"""Pages of 10 MiB: more than fits."""


@contextlib.contextmanager
def mounted(where: Path, *options: str) -> Iterator[Path]:
    """Something mounted at ``where``; skips where that is not allowed."""
    where.mkdir(exist_ok=True)
    made = subprocess.run(["mount", *options, str(where)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"cannot mount here: {made.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


@contextlib.contextmanager
def tmpfs(base: Path) -> Iterator[Path]:
    with mounted(base / "disk", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs") as disk:
        yield disk


@contextlib.contextmanager
def ext4(base: Path) -> Iterator[Path]:
    """A file system with blocks and directories of its own to run out of."""
    image = base / "image"
    image.write_bytes(b"")
    os.truncate(image, 4 * SIZE)
    try:
        subprocess.run(
            ["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", str(image)], check=True, capture_output=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs mkfs.ext4: {error}")
    with mounted(base / "disk", "-o", "loop", str(image)) as disk:
        yield disk


@pytest.fixture(params=[tmpfs, ext4], ids=["tmpfs", "ext4"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A small disk, with the world's repository in ``store``."""
    with request.param(tmp_path) as where:
        LocalStore(where / "store").put_many([(i.key, world().get(i.key)) for i in world().list()], mode="create")
        yield where


def fill_up(disk: Path, leave: int = 0) -> Path:
    """A file that takes all the room but ``leave`` bytes."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
        file.truncate(max(0, file.tell() - leave))
    return ballast


def files(root: Path) -> set[str]:
    """All that is visible, and all that is not."""
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


WRITING = {name: each for name, each in OPERATIONS.items() if not (each.is_read or each.mends)}


def test_a_snapshot_larger_than_the_disk(disk: Path) -> None:
    truth = learn(world())
    before = files(disk / "store")
    with Repository.open(LocalStore(disk / "store")) as repo:
        with pytest.raises(StoreFull) as caught:
            repo.put_pages(BIG)
        assert caught.value.hint and caught.value.exit_code == 30
        assert files(disk / "store") - before <= {".lock"}, "a half-written file was left"
        assert_nothing_lost(repo.store, truth)
        made = snapshot(repo, halves(2, 60))  # the same process goes on with what fits
        assert read_back(repo, made.cid) == halves(2, 60)
    with Repository.open(LocalStore(disk / "store")) as repo:
        assert fsck.check(repo).is_clean


@pytest.mark.parametrize(
    "leave", [0, *[pytest.param(size, marks=pytest.mark.slow) for size in (4096, 8192, 16384, 65536)]]
)
@pytest.mark.parametrize("name", WRITING)
def test_a_full_disk(disk: Path, name: str, leave: int) -> None:
    """Each operation succeeds, or is refused and leaves nothing; and succeeds once there is room."""
    operation, truth = WRITING[name], learn(world())
    ballast = fill_up(disk, leave)
    store = LocalStore(disk / "store")
    with Repository.open(store) as repo:
        with contextlib.suppress(StoreFull):
            operation.act(repo)
        assert not [*(disk / "store").glob(".tmp/*")], "room is given back at once"
        assert_nothing_lost(store, truth, operation.moves)
        ballast.unlink()
        with contextlib.suppress(*operation.again):
            operation.act(repo)
        assert operation.is_done(repo)
    assert_nothing_lost(store, truth, operation.moves)


def test_a_full_disk_is_read_and_emptied(disk: Path) -> None:
    """Reading needs no room; a gc needs a block for its announcement, and then makes room."""
    store = LocalStore(disk / "store")
    with Repository.open(store) as repo:
        repo.put_pages(BIG[:8])
        truth = learn(store)
        ballast = fill_up(disk)
        assert_nothing_lost(store, truth)
        with pytest.raises(StoreFull):
            gc.apply(repo, gc.plan(repo, min_age=0))
        assert_nothing_lost(store, truth)
        os.truncate(ballast, ballast.stat().st_size - LITTLE)
        gc.apply(repo, gc.plan(repo, min_age=0))
        assert_nothing_lost(store, truth)
        assert os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize > 8 * len(BIG[0])


# -- without a mount -----------------------------------------------------------------------------------------------


def limited(act: Callable[[], object], size: int) -> None:
    """Run with a limit on the size of files: the kernel refuses what goes beyond (EFBIG)."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        act()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with Repository.init(store) as repo:
        snapshot(repo, halves(1))
        truth = learn(store)
        with pytest.raises(StoreError, match="File too large"):
            limited(lambda: repo.put_pages(BIG), 1 << 20)
        assert not [*tmp_path.glob(".tmp/*")]
        assert_nothing_lost(store, truth)
        assert repo.put_pages(BIG).new_pages == len(BIG)


# -- read only -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def on_a_mount(where: Path) -> Iterator[Store]:
    """A directory on a file system that was mounted to be read."""
    with mounted(where, "--bind", str(where)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(where)], check=True)
        yield LocalStore(where)


@contextlib.contextmanager
def opened_so(where: Path) -> Iterator[Store]:
    """A directory behind a store that takes no writes, as `kvist ui` opens it."""
    yield ReadOnlyStore(LocalStore(where))


read_only = pytest.mark.parametrize("read_only", [on_a_mount, opened_so])


ReadOnly = Callable[[Path], contextlib.AbstractContextManager[Store]]

FROM_HERE = {"pull", "clone"}
"""They ask the place that they copy from for a lease, and do without where it takes none."""


@read_only
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_read_only_disk(read_only: ReadOnly, name: str, tmp_path: Path) -> None:
    operation, truth = OPERATIONS[name], learn(world())
    save(world(), tmp_path / "store")
    before = files(tmp_path / "store")
    with read_only(tmp_path / "store") as store:
        with Repository.open(store) as repo:
            if operation.is_read or name in FROM_HERE:
                operation.act(repo)
            else:
                expected = KvistError if operation.mends else StoreError
                with pytest.raises(expected, match=None if operation.mends else "Read-only file system|read only"):
                    operation.act(repo)
        assert_nothing_lost(store, truth)
        assert files(tmp_path / "store") == before


@read_only
def test_a_damaged_page_on_a_read_only_disk_is_found_though_it_cannot_be_marked(
    read_only: ReadOnly, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = LocalStore(tmp_path / "store", durable=False)
    with Repository.init(store) as repo:
        made = snapshot(repo, halves(1))
        (segment,) = repo.pages.segments()
        data = bytearray(store.get(segment.key))
        data[0] ^= 1
        store.put(segment.key, data)
    with read_only(tmp_path / "store") as seen, Repository.open(seen) as repo:
        for _ in range(2):
            with pytest.raises(KvistError, match="is damaged"):
                read_back(repo, made.cid)
        assert "could not record the damage" in caplog.text
        assert [finding.code for finding in fsck.check(repo).findings] == [fsck.Code.DAMAGED_PAGE]
    with Repository.open(store) as repo:
        assert repo.refs.read(RefKind.BRANCH, "main") is not None
