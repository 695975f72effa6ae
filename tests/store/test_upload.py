import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.errors import AlreadyExists, InvalidInput, StoreError
from kvist.hashing import Buffer
from kvist.store import upload
from kvist.store.upload import PartsWriter


class Far:
    """What a `PartsWriter` talks to; ``go`` lets one more part travel."""

    def __init__(self, *, is_taken: bool = False, fails_at: int | None = None) -> None:
        self.is_taken, self.fails_at = is_taken, fails_at
        self.whole: bytes | None = None
        self.parts: list[bytes] = []
        self.is_discarded = False
        self.go = threading.Semaphore(1 << 20)

    def writer(self) -> PartsWriter:
        return PartsWriter("k", self.put, lambda: self.is_taken, self.send)

    def put(self, data: Buffer) -> None:
        if self.is_taken:
            raise AlreadyExists("taken")
        self.whole = bytes(data)

    def send(self, parts: Iterator[Buffer]) -> None:
        try:
            while True:
                self.go.acquire()
                part = next(parts, None)
                if part is None:
                    break
                if len(self.parts) == self.fails_at:
                    raise StoreError("refused")
                self.parts.append(bytes(part))
        except BaseException:
            self.is_discarded = True
            raise
        self.whole = b"".join(self.parts)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "PART", 10)


@given(st.lists(st.binary(max_size=35), max_size=8))
def test_every_byte_once_and_in_order(pieces: list[bytes]) -> None:
    far = Far()
    with far.writer() as writer:
        for piece in pieces:
            writer.write(piece)
        writer.commit()
    data = b"".join(pieces)
    assert far.whole == data
    assert bool(far.parts) == (len(data) > upload.PART), "what fits in one part goes by one put"
    assert all(len(part) == upload.PART for part in far.parts[:-1])


def test_a_slow_network_holds_up_the_writer() -> None:
    """One part is being sent, one is ready, one is being filled: no more is ever in memory here."""
    far = Far()
    far.go = threading.Semaphore(0)
    written = []

    def write() -> None:
        with far.writer() as writer:
            for i in range(20):
                writer.write(bytes([i]) * 10)
                written.append(i)
            writer.commit()

    thread = threading.Thread(target=write)
    thread.start()
    for allowed in range(22):
        far.go.release()
        assert len(written) <= allowed + 3
    thread.join()
    assert far.whole == b"".join(bytes([i]) * 10 for i in range(20))


def test_a_taken_key_discards_the_parts() -> None:
    far = Far(is_taken=True)
    with far.writer() as writer:
        writer.write(bytes(35))
        with pytest.raises(AlreadyExists):
            writer.commit()
        with pytest.raises(InvalidInput):
            writer.commit()
    assert far.is_discarded and far.whole is None


@pytest.mark.parametrize("fails_at", [0, 1, 3])
def test_a_refused_part_ends_the_writer(fails_at: int) -> None:
    far = Far(fails_at=fails_at)
    writer = far.writer()
    with pytest.raises(StoreError, match="refused"):
        for _ in range(4):
            writer.write(bytes(10))
        writer.commit()
    with pytest.raises(InvalidInput):
        writer.write(b"more")
    writer.abort()
    assert far.is_discarded and far.whole is None


def test_abort_discards_what_travels() -> None:
    far = Far()
    with pytest.raises(ZeroDivisionError), far.writer() as writer:
        writer.write(bytes(50))
        raise ZeroDivisionError
    assert far.is_discarded and far.whole is None
