import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvist.repo.tier import PageTier, directory, open_tier
from kvist.repo.tier.base import FIRST_PAUSE_S, Clock
from kvist.repo.tier.directory import DirectoryTier
from kvist.store.posix import exclusive
from kvist.testing.page_tier import ManualClock, PageTierTests, name_of, page, read

from .processes import TESTS

SIZE = 1000


class TestDirectoryTier(PageTierTests):
    def make_tier(self, tmp_path: Path) -> PageTier:
        return DirectoryTier(tmp_path / "tier", max_bytes=32 << 20)

    def make_down(self, tmp_path: Path, clock: Clock) -> PageTier:
        (tmp_path / "file").touch()
        return DirectoryTier(tmp_path / "file" / "tier", max_bytes=32 << 20, clock=clock)


def held(root: Path) -> int:
    """Bytes of all pages."""
    return sum(path.stat().st_size for path in root.glob("??/*"))


def held_now(root: Path) -> int:
    """The same, while others name and delete pages."""
    with exclusive(root / ".lock"):
        return held(root)


def temporary(root: Path) -> list[Path]:
    return list((root / ".tmp").glob("*"))


def items(count: int, first: int = 0, size: int = SIZE) -> list[tuple[str, bytes]]:
    return [(name_of(data), data) for data in (page(size, i) for i in range(first, first + count))]


def has(tier: PageTier, some: list[tuple[str, bytes]]) -> list[bool]:
    return [got is not None for got in read(tier, [name for name, _ in some], [len(data) for _, data in some])]


def test_nothing_is_made_before_the_first_write(tmp_path: Path) -> None:
    with DirectoryTier(tmp_path / "tier", max_bytes=100) as tier:
        assert read(tier, [name_of(b"x")], [1]) == [None]
        assert tier.stats().errors == 0
    assert not (tmp_path / "tier").exists()


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    tier, other = (DirectoryTier(tmp_path, max_bytes=10 * SIZE) for _ in range(2))
    pages = items(10)
    tier.write(pages)
    assert has(other, pages[:3]) == [True] * 3
    other.write(pages[3:5])  # there already: a use too
    tier.write(items(3, 10))
    assert has(tier, pages) == [True] * 5 + [False] * 3 + [True] * 2
    assert held(tmp_path) == 10 * SIZE


def test_room_is_made_for_a_64th_more(tmp_path: Path) -> None:
    tier = DirectoryTier(tmp_path, max_bytes=128 * SIZE)
    tier.write(items(128))
    tier.write(items(1, 128))
    assert held(tmp_path) == 126 * SIZE


def test_a_page_larger_than_the_bound_is_not_kept(tmp_path: Path) -> None:
    tier = DirectoryTier(tmp_path, max_bytes=SIZE)
    tier.write([*items(1), *items(1, 1, SIZE + 1)])
    assert held(tmp_path) == SIZE
    assert tier.stats().errors == 0


def test_a_large_directory_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never over the bound; what goes is old, though not always the oldest."""
    monkeypatch.setattr(directory, "_SAMPLE", 32)
    tier = DirectoryTier(tmp_path, max_bytes=400 * 10)
    for first in range(0, 1600, 40):
        tier.write(items(40, first, 10))
        assert held(tmp_path) <= 400 * 10
    ages = [i for i, here in enumerate(has(tier, items(1600, 0, 10))) if here]
    assert len(ages) > 380
    assert sum(age >= 1100 for age in ages) > 0.9 * len(ages)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 20), st.lists(st.tuples(st.sampled_from("wrf"), st.integers(0, 15), st.integers(1, 6)), max_size=40)
)
def test_it_is_an_lru_cache(
    tmp_path_factory: pytest.TempPathFactory, room: int, history: list[tuple[str, int, int]]
) -> None:
    """As a model says, through two instances in turn."""
    root = tmp_path_factory.mktemp("lru")
    tiers = [DirectoryTier(root, max_bytes=room * SIZE) for _ in range(2)]
    pages = items(21)
    model: list[int] = []
    for turn, (act, first, count) in enumerate(history):
        tier, which = tiers[turn % 2], range(first, first + count)
        if act == "r":
            for i in which:
                assert has(tier, [pages[i]]) == [i in model]
                if i in model:
                    model = [*(j for j in model if j != i), i]
        elif act == "f":
            tier.forget([pages[i][0] for i in which])
            model = [i for i in model if i not in which]
        else:
            for i in which:  # one by one, since of one call the first may push out the last
                tier.write([pages[i]])
                model = [*(j for j in model if j != i), i][-room:]
        assert held(root) == len(model) * SIZE


def test_processes_that_are_killed_leave_it_bounded_and_right(tmp_path: Path) -> None:
    """Four write, read and are killed at random moments, again and again; then nothing is torn and all is counted."""
    chance = random.Random(1)
    bound = 200_000
    for _ in range(2):
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "repo.tier_process", str(tmp_path), str(bound), str(chance.random())],
                cwd=TESTS,
                stdout=subprocess.PIPE,
            )
            for _ in range(4)
        ]
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        for _ in range(10):
            time.sleep(chance.random() / 50)
            assert held_now(tmp_path) <= bound
        for process in running:
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
    tier = DirectoryTier(tmp_path, max_bytes=bound)
    for path in tmp_path.glob("??/*"):
        assert path.name == name_of(path.read_bytes()).replace(":", "-")
    tier.write(items(1))
    assert temporary(tmp_path) == []
    assert held(tmp_path) == int.from_bytes((tmp_path / ".bytes").read_bytes()[:8], "little") <= bound


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 16, None])
def test_a_count_that_is_lost_or_old_is_made_anew(tmp_path: Path, content: bytes | None) -> None:
    tier = DirectoryTier(tmp_path, max_bytes=10 * SIZE)
    tier.write(items(10))
    if content is None:
        (tmp_path / ".bytes").unlink()
    else:
        (tmp_path / ".bytes").write_bytes(content)
    tier.write(items(5, 10))
    assert held(tmp_path) == 10 * SIZE


def test_what_is_deleted_by_hand_makes_room(tmp_path: Path) -> None:
    tier = DirectoryTier(tmp_path, max_bytes=10 * SIZE)
    tier.write(items(10))
    for path in tmp_path.glob("??/*"):
        path.unlink()
    tier.write(items(10, 10))
    assert held(tmp_path) == 10 * SIZE


def test_others_use_it_at_once(tmp_path: Path) -> None:
    """Threads with instances of their own, all writing more than there is room for."""
    bound = 50 * SIZE
    done = threading.Event()
    most = 0

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, held_now(tmp_path))

    def work(number: int) -> None:
        tier = DirectoryTier(tmp_path, max_bytes=bound)
        for first in range(0, 160, 20):
            tier.write(items(20, number * 100 + first))
            has(tier, items(20, first))
        assert tier.stats().errors == 0

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    watcher = threading.Thread(target=watch)
    watcher.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    watcher.join()
    assert 40 * SIZE < held(tmp_path) <= bound
    assert most <= bound


def test_a_full_disk_stops_writing_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = ManualClock()
    tier = DirectoryTier(tmp_path, max_bytes=100 * SIZE, clock=clock)
    tier.write(items(2))

    def full(fd: int, data: object) -> None:
        os.write(fd, b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(directory, "write_all", full)
        for _ in range(3):
            tier.write(items(2, 2))
            clock.now += FIRST_PAUSE_S
        assert (tier.stats().errors, tier.stats().is_down) == (2, True)
        assert has(tier, items(4)) == [True, True, False, False]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left" in caplog.text
    assert temporary(tmp_path) == []
    clock.now += 2 * FIRST_PAUSE_S
    tier.write(items(2, 2))
    assert has(tier, items(4)) == [True] * 4
    assert not tier.stats().is_down


def test_a_directory_that_cannot_be_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    DirectoryTier(tmp_path, max_bytes=100 * SIZE).write(items(2))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(directory, "Temporary", refuse)
    monkeypatch.setattr(os, "utime", refuse)
    tier = DirectoryTier(tmp_path, max_bytes=100 * SIZE)
    assert has(tier, items(2)) == [True] * 2
    tier.write(items(1, 2))
    assert (tier.stats().errors, tier.stats().hits) == (1, 2)


def test_what_is_no_page_is_left_alone(tmp_path: Path) -> None:
    tier = DirectoryTier(tmp_path, max_bytes=2 * SIZE)
    tier.write(items(2))
    shard = next(tmp_path.glob("??"))
    (shard / "directory").mkdir()
    (tmp_path / "notes").write_text("mine")
    tier.write(items(2, 2))
    assert has(tier, items(4)) == [False, False, True, True]
    assert (shard / "directory").exists() and (tmp_path / "notes").exists()
    assert tier.stats().errors == 0


def test_a_directory_that_is_removed_is_made_again(tmp_path: Path) -> None:
    import shutil

    root = tmp_path / "tier"
    tier = DirectoryTier(root, max_bytes=10 * SIZE)
    tier.write(items(2))
    shutil.rmtree(root)
    assert has(tier, items(1)) == [False]
    tier.write(items(2))
    assert has(tier, items(2)) == [True, True]


def test_its_url(tmp_path: Path) -> None:
    tier = open_tier(f"file://{tmp_path}/a%20b?max_bytes=1GiB")
    assert isinstance(tier, DirectoryTier)
    assert tier.url == f"file://{tmp_path}/a%20b?max_bytes={1 << 30}"
