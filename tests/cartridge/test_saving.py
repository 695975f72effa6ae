"""A directory is written whole or not at all: killed writers, racing writers, full disks, other people's files."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kvist.cartridge import directory as saving
from kvist.cartridge.cartridge import Cartridge
from kvist.errors import AlreadyExists, DamagedCartridge, InvalidInput, StoreError

from .making import make_cartridge, same

WRITER = """
import sys
from pathlib import Path
from tests.cartridge.making import make_cartridge
made = make_cartridge(2000)
print("ready", flush=True)
sys.stdin.readline()
made.save_pretrained(Path(sys.argv[1]), max_shard_size=20_000)
print("done", flush=True)
"""


def start(target: Path) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(target)], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    return writer


def go(writer: subprocess.Popen[str]) -> None:
    assert writer.stdin is not None
    writer.stdin.write("go\n")
    writer.stdin.flush()


def hidden(parent: Path) -> list[str]:
    return [path.name for path in parent.iterdir() if path.name.startswith(".")]


def has_come_to(parent: Path, files: int | str) -> bool:
    if files == "renamed":
        return (parent / "c").exists()
    try:
        return any(len(list(staged.iterdir())) >= int(files) for staged in parent.glob(".c.*.tmp"))
    except FileNotFoundError:  # renamed meanwhile
        return True


@pytest.mark.parametrize("files", [0, 1, 5, 12, "renamed"])
def test_killed_in_the_middle(tmp_path: Path, files: int | str) -> None:
    """After any number of files: nothing, or all of it; what is left over the next writer takes away."""
    target = tmp_path / "c"
    writer = start(target)
    go(writer)
    while writer.poll() is None and not has_come_to(tmp_path, files):
        pass
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    if target.exists():
        with Cartridge.from_pretrained(target) as opened:
            assert same(opened, make_cartridge(2000))
    else:
        assert all(name.startswith(".c.") and name.endswith(".tmp") for name in hidden(tmp_path))
    make_cartridge(2000).save_pretrained(target)
    with Cartridge.from_pretrained(target) as opened:
        assert same(opened, make_cartridge(2000))
    if files != "renamed":
        assert hidden(tmp_path) == []


def test_a_living_writer_is_not_swept(tmp_path: Path) -> None:
    target = tmp_path / "c"
    writer = start(target)
    go(writer)
    while writer.poll() is None and not has_come_to(tmp_path, 1):  # then it holds the lock
        time.sleep(0)
    writer.send_signal(signal.SIGSTOP)
    staged = set(hidden(tmp_path))
    try:
        make_cartridge(5).save_pretrained(target)
    except AlreadyExists:
        assert not staged  # it was through already
    left = set(hidden(tmp_path))
    writer.send_signal(signal.SIGCONT)
    writer.communicate()
    assert left == staged
    assert hidden(tmp_path) == []


def test_racing_writers_agree(tmp_path: Path) -> None:
    """Of the same cartridge: all succeed or are told that it is there. Of others: one wins, and is whole."""
    made = [make_cartridge(200, seed=n % 3) for n in range(9)]
    barrier, refused = threading.Barrier(9), []

    def save(mine: Cartridge) -> None:
        barrier.wait()
        try:
            mine.save_pretrained(tmp_path / "c")
        except AlreadyExists:
            refused.append(mine)

    threads = [threading.Thread(target=save, args=(mine,)) for mine in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Cartridge.from_pretrained(tmp_path / "c") as opened:
        winners = [mine for mine in made if mine not in refused]
        assert winners and all(same(opened, mine) for mine in winners)
    assert hidden(tmp_path) == []
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["cartridge.json", "cartridge.safetensors"]


def test_other_peoples_files_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.txt").write_text("mine")
    with pytest.raises(AlreadyExists):
        make_cartridge().save_pretrained(tmp_path / "c")
    assert [path.name for path in tmp_path.rglob("*")] == ["c", "notes.txt"]


def test_a_different_cartridge_is_not_replaced(tmp_path: Path) -> None:
    make_cartridge().save_pretrained(tmp_path / "c")
    before = {path: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    for other in (make_cartridge(seed=1), make_cartridge(cartridge_id="x"), make_cartridge(ids=False)):
        with pytest.raises(AlreadyExists, match="not touched"):
            other.save_pretrained(tmp_path / "c")
    assert {path: path.read_bytes() for path in (tmp_path / "c").iterdir()} == before


def test_an_empty_directory_is_filled_and_a_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make_cartridge().save_pretrained(tmp_path / "empty")
    Cartridge.from_pretrained(tmp_path / "empty").close()
    (tmp_path / "file").write_text("x")
    with pytest.raises(AlreadyExists, match="no directory"):
        make_cartridge().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def test_parents_are_made(tmp_path: Path) -> None:
    make_cartridge().save_pretrained(tmp_path / "a" / "b" / "c")
    Cartridge.from_pretrained(tmp_path / "a" / "b" / "c").close()


@pytest.mark.parametrize("call", range(4))
def test_a_full_disk_leaves_nothing(tmp_path: Path, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [call]

    def full(handle: int) -> None:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1

    monkeypatch.setattr(saving.os, "fsync", full)
    with pytest.raises(StoreError, match="No space"):
        make_cartridge().save_pretrained(tmp_path / "c", max_shard_size=1500)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_cartridge()
    made.save_pretrained(tmp_path / "c")
    before = {path: path.read_bytes() for path in (tmp_path / "c").iterdir()}

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(saving.os, "fsync", full)
    with pytest.raises(StoreError):
        made.with_metadata(labels={"a": "b"}).save_pretrained(tmp_path / "c")
    assert {path: path.read_bytes() for path in (tmp_path / "c").iterdir()} == before


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, place in (("a", "empty"), ("b", "none")):
        (tmp_path / name).symlink_to(tmp_path / place)
        make_cartridge().save_pretrained(tmp_path / name)
        assert (tmp_path / name).is_symlink() and not (tmp_path / place).is_symlink()
        Cartridge.from_pretrained(tmp_path / place).close()


def test_the_working_directory_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", tmp_path / "here"):
        with pytest.raises(InvalidInput, match="working directory"):
            make_cartridge().save_pretrained(name)
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


@pytest.mark.parametrize("damage", ["flipped", "missing", "cut"])
def test_a_damaged_copy_is_not_called_saved(tmp_path: Path, damage: str) -> None:
    made = make_cartridge()
    made.save_pretrained(tmp_path / "c")
    file = tmp_path / "c" / "cartridge.safetensors"
    data = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1] if damage == "flipped" else []))
    manifest = (tmp_path / "c" / "cartridge.json").read_bytes()
    with pytest.raises(DamagedCartridge, match="already, and is damaged") as caught:
        make_cartridge(labels={"a": "b"}).save_pretrained(tmp_path / "c")
    assert caught.value.hint is not None and "remove it" in caught.value.hint
    assert (tmp_path / "c" / "cartridge.json").read_bytes() == manifest


@pytest.mark.parametrize("when", ["opened", "locked"])
def test_a_sweep_between_making_and_locking(tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another writer to the same place takes a directory that is not locked yet for a dead one's; it is made anew."""
    lock, swept = saving._lock, []

    def slow(directory: Path, how: int = saving.fcntl.LOCK_EX) -> int:
        if swept or not directory.name.startswith("."):
            return lock(directory, how)
        swept.append(directory)
        if when == "opened":
            handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            saving._sweep(tmp_path / "c")
            saving.fcntl.flock(handle, how)
            return handle
        saving._sweep(tmp_path / "c")
        return lock(directory, how)

    monkeypatch.setattr(saving, "_lock", slow)
    made = make_cartridge()
    made.save_pretrained(tmp_path / "c")
    assert swept and hidden(tmp_path) == []
    with Cartridge.from_pretrained(tmp_path / "c") as opened:
        assert same(opened, made)


def test_killed_while_it_rewrote_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What that writer left in the cartridge's directory, the next one takes away."""
    made = make_cartridge()
    made.save_pretrained(tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda path, target: None)
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
        made.with_metadata(license="MIT").save_pretrained(tmp_path / "c")
    assert hidden(tmp_path / "c") != []
    made.with_metadata(license="GPL").save_pretrained(tmp_path / "c")
    assert hidden(tmp_path / "c") == []
    with Cartridge.from_pretrained(tmp_path / "c") as opened:
        assert opened.manifest.license == "GPL" and same(opened, made)
