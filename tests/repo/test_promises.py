"""docs/promises.md, proven: every operation meets an error, a lost answer and a crash at each of its calls in turn."""

import contextlib
import random

import pytest

from kvist.errors import IntegrityError, InvalidManifest, KvistError, Locked, NotFound, StoreError, StoreFull
from kvist.repo import RefKind, Repository, fsck, marks, mending, objects, repair, transfer
from kvist.store import MemoryStore
from kvist.testing.faults import CrashingStore, Full, Refuse, Rot, SimulatedCrash, Tear
from kvist.testing.faulty import FaultyStore

from .making import read_back
from .operations import OPERATIONS, Operation, collect, world
from .worlds import Truth, assert_nothing_lost, copy, learn, readable

SLOW = (pytest.mark.slow, pytest.mark.timeout(3600))


@pytest.fixture(autouse=True)
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Manifests are read again and again, as in a repository with many."""
    monkeypatch.setattr(objects, "_MANIFESTS_KEPT", 1)


@pytest.fixture(params=OPERATIONS)
def operation(request: pytest.FixtureRequest) -> Operation:
    return OPERATIONS[request.param]


@pytest.fixture(scope="module")
def truth() -> Truth:
    return learn(world())


def prepared(operation: Operation) -> MemoryStore:
    below = copy(world())
    operation.before(below)
    return below


def complete(repo: Repository, operation: Operation) -> None:
    """The store is well again: the operation is run again, and completes or is found done."""
    with contextlib.suppress(*operation.again):
        operation.act(repo)
    assert operation.is_done(repo)


def assert_harmless(below: MemoryStore, operation: Operation, truth: Truth) -> None:
    """What went wrong has cost nothing that was there."""
    if operation.mends:
        assert readable(below, truth) >= readable(prepared(operation), truth)
    else:
        assert_nothing_lost(below, truth, operation.moves)


@pytest.mark.parametrize("step", [pytest.param(1, marks=SLOW), 9])
@pytest.mark.parametrize("after", [False, True], ids=["refused", "answer lost"])
def test_an_error_at_any_call(operation: Operation, truth: Truth, after: bool, step: int) -> None:
    call, finished = 1 - step, False
    while not finished:
        call += step
        below = prepared(operation)
        store = FaultyStore(below, Refuse(at={call}, after=after))
        store.active = False
        with Repository.open(store) as repo:
            store.active = True
            try:
                operation.act(repo)
                finished = store.calls < call
            except StoreError as error:
                assert "as was wished" in str(error), "an error of the store must come through as it is"
            store.active = False
            assert_harmless(below, operation, truth)
            if operation.is_read:
                assert below._objects.keys() == prepared(operation)._objects.keys()
            complete(repo, operation)  # by the same process, which goes on
        assert_nothing_lost(below, truth, operation.moves)
    assert call > 1


@pytest.mark.parametrize("step", [pytest.param(1, marks=SLOW), 3])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_crash_at_any_write(operation: Operation, truth: Truth, after: bool, step: int) -> None:
    write, finished = 1 - step, False
    while not finished:
        write += step
        below = prepared(operation)
        store = CrashingStore(below)
        repo = Repository.open(store)
        store.arm(write, after=after)
        try:
            operation.act(repo)
            finished = True
        except SimulatedCrash:
            pass
        repo.pages.close()
        assert_harmless(below, operation, truth)
        with Repository.open(below) as repo:
            complete(repo, operation)
        assert_nothing_lost(below, truth, operation.moves)
    assert operation.is_read == (write == 1)


@pytest.mark.parametrize("step", [pytest.param(37, marks=SLOW), 499])
def test_a_full_store_at_any_byte(operation: Operation, truth: Truth, step: int) -> None:
    """`StoreFull`, nothing half-visible, and everything goes on once there is room."""
    room, finished = 0, False
    while not finished:
        below = prepared(operation)
        store = FaultyStore(below, Full(room=room))
        store.active = False
        with Repository.open(store) as repo:
            store.active = True
            try:
                operation.act(repo)
                finished = True
            except StoreFull:
                assert not operation.is_read
            store.active = False
            assert_harmless(below, operation, truth)
            complete(repo, operation)
        assert_nothing_lost(below, truth, operation.moves)
        room += step
    assert not operation.is_read or room == step


@pytest.mark.parametrize("silent", [True, False], ids=["silently", "with an error"])
@pytest.mark.parametrize("write", range(1, 5))
def test_a_write_that_was_torn_is_found(truth: Truth, write: int, silent: bool) -> None:
    """By a disk that lies: what was there before is not harmed, and what is torn is named, never read."""
    below = copy(world())
    torn = FaultyStore(below, Tear(at={write}, keep=0.6, silent=silent))
    with Repository.open(torn) as repo, contextlib.suppress(StoreError, IntegrityError, InvalidManifest):
        OPERATIONS["snapshot"].act(repo)
    assert readable(below, truth) >= truth.pages.keys() - {truth.refs[RefKind.BRANCH, "main"]}
    with Repository.open(below) as repo:
        findings = fsck.check(repo).findings
        assert findings or not silent or OPERATIONS["snapshot"].is_done(repo)
        with Repository.open(world()) as source:
            planned = transfer.plan(source, repo, everything=True, force=True, heal=True)
            transfer.apply(source, repo, planned)
        assert fsck.check(repo).is_whole
        OPERATIONS["snapshot"].act(repo)
        assert OPERATIONS["snapshot"].is_done(repo) and fsck.check(repo).is_whole


@pytest.mark.parametrize("step", [pytest.param(1, marks=SLOW), 7])
def test_wrong_bytes_at_any_read(operation: Operation, truth: Truth, step: int) -> None:
    """From the wire, or a bad memory: a named error or the right result; nothing that is whole is deleted for it."""
    call, finished = 1 - step, False
    while not finished:
        call += step
        below = prepared(operation)
        store = FaultyStore(below, Rot(at={call}), seed=call)
        store.active = False
        with Repository.open(store) as repo:
            store.active = True
            try:
                fsck.check(repo) if operation is OPERATIONS["fsck"] else operation.act(repo)  # it may report it
                finished = not store.fired
            except (IntegrityError, InvalidManifest, NotFound, Locked) as error:
                assert not finished and str(error)
            store.active = False
        with Repository.open(below) as repo:
            mending.apply(repo, repair.plan(repo))  # a mark on a copy that is whole is taken back
            assert_harmless(below, operation, truth)
            complete(repo, operation)
        assert_nothing_lost(below, truth, operation.moves)


@pytest.mark.parametrize("seeds", [pytest.param(range(1000, 1200), marks=SLOW), range(6)], ids=["many", "few"])
def test_a_bad_day(truth: Truth, seeds: range) -> None:
    """Two processes do what comes to mind, and one call in thirty fails: whatever a ref reaches stays whole."""
    acts = [operation for operation in OPERATIONS.values() if not operation.mends]
    for seed in seeds:
        chance, below = random.Random(seed), copy(world())
        store = FaultyStore(below, Refuse(chance=0.02), Refuse(chance=0.02, after=True), seed=seed)
        store.active = False
        with Repository.open(store) as one, Repository.open(store) as other:
            for _ in range(12):
                store.active = True
                with contextlib.suppress(KvistError):
                    chance.choice(acts).act(chance.choice([one, other]))
                store.active = False
        for _ in range(2):
            with Repository.open(below) as repo:
                assert fsck.check(repo).is_clean
                for cid, data in truth.pages.items():
                    if cid in repo.reachable() and cid not in marks.pruned(below):
                        assert read_back(repo, cid) == data
                collect(repo)  # what nothing reaches is no more than that
