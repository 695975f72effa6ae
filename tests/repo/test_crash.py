"""A snapshot, a push, a gc, a prune and a repair, each killed with SIGKILL at random points of a real process."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvist.repo import Repository
from kvist.store import LocalStore

from .kills import Killer
from .operations import OPERATIONS, Operation, world
from .worlds import Truth, assert_nothing_lost, learn, readable

KILLED = ["snapshot", "push", "gc", "prune", "repair"]


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    with Killer() as started:
        yield started


@pytest.fixture(scope="module")
def truth() -> Truth:
    return learn(world())


def build(operation: Operation, root: Path) -> Path:
    store = LocalStore(root, durable=False)
    store.put_many([(info.key, world().get(info.key)) for info in world().list()], mode="create")
    operation.before(store)
    return root


def check(root: Path, operation: Operation, truth: Truth, before: set[str]) -> None:
    """Nothing that a ref reached is lost, no ref points at nothing, and the operation completes when run again."""
    store = LocalStore(root, durable=False)
    if operation.mends:
        assert readable(store, truth) >= before
    else:
        assert_nothing_lost(store, truth, operation.moves)
    with Repository.open(store) as repo:
        operation.act(repo)
        assert operation.is_done(repo)
    assert_nothing_lost(store, truth, operation.moves)


def kill_often(killer: Killer, name: str, truth: Truth, tmp_path: Path, kills: int) -> int:
    """Until so many were really killed, half of them at a write to the store, half at any moment; how many ended
    before it came to that."""
    operation, chance = OPERATIONS[name], random.Random(name)
    template = build(operation, tmp_path / "template")
    before = readable(LocalStore(template), truth)
    whole = killer.run(name, shutil.copytree(template, tmp_path / "whole"))
    assert whole["writes"] > 0
    killed = ended = 0
    while killed < kills:
        root = shutil.copytree(template, tmp_path / "turn")
        if killed % 2:
            at = {"write": chance.randint(1, whole["writes"]), "after": chance.random() < 0.5}
        else:
            at = {"delay": chance.uniform(0, whole["seconds"])}
        if killer.run(name, root, seed=killed, **at)["killed"]:
            killed += 1
        else:
            ended += 1
        check(root, operation, truth, before)
        shutil.rmtree(root)
    return ended


@pytest.mark.parametrize("name", KILLED)
def test_killed_at_twenty_points(killer: Killer, truth: Truth, tmp_path: Path, name: str) -> None:
    kill_often(killer, name, truth, tmp_path, 20)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", KILLED)
def test_killed_at_two_hundred_points(killer: Killer, truth: Truth, tmp_path: Path, name: str) -> None:
    print(name, kill_often(killer, name, truth, tmp_path, 200), "ended before they were killed")
