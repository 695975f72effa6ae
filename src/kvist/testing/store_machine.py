"""`store_machine`: any sequence of operations on a `Store` must agree with a dict. `StoreTests` runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvist.errors import AlreadyExists, Conflict, NotFound
from kvist.store import Match, Store

_KEYS: Final = st.sampled_from(["a", "b.c", "b/c", "b/d/e", "b0", "B"])
_DATA: Final = st.binary(max_size=40) | st.sampled_from([bytes(range(256)) * 16, b"tail" * 1250])


def store_machine(
    make_store: Callable[[], Store], reopen: Callable[[Store], Store | None] = lambda store: None
) -> type[RuleBasedStateMachine]:
    """A hypothesis state machine that checks a store against a dict.

    Args:
        make_store: gives a new, empty store for each run.
        reopen: gives another instance on the same data, or ``None``.
    """

    class StoreMachine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.store = make_store()
            self.model: dict[str, bytes] = {}
            self.etags: dict[str, str] = {}

        def teardown(self) -> None:
            self.store.close()

        @rule(key=_KEYS, data=_DATA)
        def overwrite(self, key: str, data: bytes) -> None:
            self.etags[key] = self.store.put(key, data)
            self.model[key] = data

        @rule(key=_KEYS, data=_DATA)
        def create(self, key: str, data: bytes) -> None:
            if key in self.model:
                with pytest.raises(AlreadyExists):
                    self.store.put(key, data, mode="create")
            else:
                self.etags[key] = self.store.put(key, data, mode="create")
                self.model[key] = data

        @rule(key=_KEYS, seen=_KEYS, data=_DATA)
        def swap(self, key: str, seen: str, data: bytes) -> None:
            """``seen`` may be another key, or one deleted since: its etag then matches only where it is the same."""
            etag = self.etags.get(seen, "none")
            if key in self.model and self.etags[key] == etag:
                self.etags[key] = self.store.put(key, data, mode=Match(etag))
                self.model[key] = data
            else:
                with pytest.raises(Conflict):
                    self.store.put(key, data, mode=Match(etag))

        @rule(items=st.lists(st.tuples(_KEYS, _DATA), max_size=5))
        def put_many(self, items: list[tuple[str, bytes]]) -> None:
            self.store.put_many(items, mode="overwrite")
            self.model.update(items)
            self._refresh()

        @rule(items=st.lists(st.tuples(_KEYS, _DATA), max_size=5))
        def put_many_new(self, items: list[tuple[str, bytes]]) -> None:
            self.store.put_many(items, mode="create")
            self.model = dict(reversed(items)) | self.model
            self._refresh()

        @rule(key=_KEYS, pieces=st.lists(_DATA, max_size=4), commit=st.booleans())
        def write(self, key: str, pieces: list[bytes], commit: bool) -> None:
            with self.store.writer(key) as writer:
                for piece in pieces:
                    writer.write(piece)
                if commit and key in self.model:
                    with pytest.raises(AlreadyExists):
                        writer.commit()
                elif commit:
                    writer.commit()
                    self.model[key] = b"".join(pieces)
            self._refresh()

        @rule(keys=st.lists(_KEYS, max_size=4))
        def delete(self, keys: list[str]) -> None:
            self.store.delete(keys)
            for key in keys:
                self.model.pop(key, None)

        @rule()
        def reopen(self) -> None:
            other = reopen(self.store)
            if other is not None:
                self.store.close()
                self.store = other

        @rule(key=_KEYS, start=st.integers(0, 5000), size=st.none() | st.integers(0, 5000))
        def get(self, key: str, start: int, size: int | None) -> None:
            if key not in self.model:
                with pytest.raises(NotFound):
                    self.store.get(key, start=start, size=size)
            else:
                expected = self.model[key][start : None if size is None else start + size]
                assert self.store.get(key, start=start, size=size) == expected

        @invariant()
        def agrees(self) -> None:
            listed = [*self.store.list()]
            assert {info.key: self.store.get(info.key) for info in listed} == self.model
            assert [info.key for info in listed] == sorted(self.model)
            assert all(info.size == len(self.model[info.key]) for info in listed)
            assert all(info.etag == self.etags[info.key] for info in listed)

        def _refresh(self) -> None:
            """Take the etags of what was written by a call that returns none."""
            self.etags |= {info.key: info.etag for info in self.store.list()}

    return StoreMachine
