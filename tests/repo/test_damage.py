"""Whatever byte of a repository is damaged, and however: it is found, named, never returned as data, and healed."""

import collections
import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from kvist.errors import IntegrityError, InvalidManifest, NotFound
from kvist.ids import digest_hex
from kvist.repo import RefKind, Repository, fsck, lease, lock, marks, mending, repair, signing, transfer
from kvist.repo.config import CONFIG
from kvist.repo.objects import MANIFESTS, SNAPSHOTS
from kvist.store import LocalStore, MemoryStore, Store
from kvist.testing.damage import KINDS, Part, Way, harm, parts

from .making import halves, manifest, snapshot
from .worlds import Truth, copy, counted_out, fill, learn

UNFINDABLE = {
    ("branch", Way.DELETE): "nothing else knows that there was such a branch",
    ("tag", Way.DELETE): "nor such a tag",
    ("lease", Way.DELETE): "its holder's next renewal tells it",
    ("lock", Way.DELETE): "the gc that wrote it is dead",
    ("signature", Way.DELETE): "a policy that asks for it refuses the snapshot",
    ("prune mark", Way.DELETE): "unless manifests or pages are gone: then they are missing",
}
"""What no check can find, and why that returns no wrong data. What is found when it is read is not here."""
EMPTY_ON_PURPOSE = {"damage mark", "prune mark"}
"""Only their keys say anything."""


@pytest.fixture(scope="module")
def world() -> MemoryStore:
    """Some of everything, with a dead gc's lock, a lease, a mark on a damaged copy, a pruned snapshot, a signature."""
    with counted_out():
        return make_world()


def make_world() -> MemoryStore:
    store = MemoryStore()
    fill(store)
    with Repository.open(store) as repo:
        twice = halves(1, 30)
        snapshot(repo, twice, "twice")
        digest = next(iter(manifest(twice).digests))
        marks.record(store, (repo.pages.homes(digest)[0], bytes.fromhex(digest_hex(digest))))
        snapshot(repo, twice, "twice")  # writes the marked page anew
        lease.hold(repo, cids=[repo.resolve("main")])
        old = snapshot(repo, halves(1, 31), "pruned")
        snapshot(repo, halves(1, 32), "pruned")
        marks.record_pruned(store, [old.cid])
        with contextlib.suppress(ImportError):  # without the extra "sign" there is no signature
            signing.sign(store, repo.resolve("v1"), signing.PrivateKey.new("tester"))
        gone = lock.acquire(store, lock.Condemned(objects=frozenset(["snapshots/" + "0" * 64])))
        gone.close()  # its gc is
        assert fsck.check(repo).is_clean
    return store


@pytest.fixture(scope="module")
def truth(world: MemoryStore) -> Truth:
    return learn(world)


@dataclass
class Case:
    """One damage done.

    Attributes:
        store: the damaged repository.
        part: what was hit.
        way: how.
        changed: keys that are different now.
    """

    store: Store
    part: Part
    way: Way
    changed: frozenset[str]


def case(store: Store, seed: int) -> Case:
    chance = random.Random(seed)
    kinds: dict[str, list[Part]] = collections.defaultdict(list)
    for part in parts(store):
        kinds[part.kind].append(part)
    others = kinds[sorted(kinds)[seed % len(kinds)]]
    way = [*Way][seed // len(kinds) % len(Way)]
    part = chance.choice(others)
    return Case(store, part, way, harm(store, part, way, others, chance))


def reads(store: Store, truth: Truth) -> list[str]:
    """Read everything by name: each is what it was, or a named error; what was refused.

    A whole process' worth of code between store and caller takes part: nothing is kept from before the damage.
    """
    refused = []
    try:
        repo = Repository.open(store)
    except (InvalidManifest, NotFound, IntegrityError) as error:
        return [f"{CONFIG}: {error}"]
    with repo:
        for (kind, name), cid in truth.refs.items():
            try:
                ref = repo.refs.read(kind, name)
                assert ref is None or ref.cid == cid, f"{kind.noun} {name} names another snapshot"
                if ref is None:
                    refused.append(f"{kind.noun} {name}")
            except (IntegrityError, InvalidManifest) as error:
                refused.append(str(error))
        for cid, whole in truth.pages.items():
            try:
                found = repo.objects.snapshot(cid)
                assert found == truth.snapshots[cid]
                data = []
                for each in found.manifests:
                    listed = repo.manifest(each)
                    outs = [bytearray(listed.layout.page_bytes) for _ in listed.digests]
                    repo.get_pages([*listed.digests], [memoryview(out) for out in outs])
                    data += map(bytes, outs)
                assert data == whole, "wrong bytes were returned as data"
            except (IntegrityError, InvalidManifest, NotFound) as error:
                refused.append(f"{cid}: {error}")
    return refused


def findings(store: Store) -> list[fsck.Finding]:
    with Repository.open(store) as repo:
        return fsck.check(repo).findings


def names(it: Case, world: Store) -> set[str]:
    """What a finding about it may call it: the name of the ref, the digits of the cid, the segment or a page of it."""
    found = set(it.changed)
    for key in it.changed:
        found |= {f"{kind.noun} {key.removeprefix(kind).removesuffix('.ref')}" for kind in RefKind if kind in key}
        found |= {key.removeprefix(start) for start in (SNAPSHOTS, MANIFESTS) if key.startswith(start)}
    with Repository.open(world) as repo:
        for each in repo.pages.segments():
            if each.key in it.changed:
                found.update(repo.pages.names(each))
    return found


def check_found(it: Case, world: Store, truth: Truth) -> None:
    """fsck names it, or a read does; and what a read meets, fsck knows."""
    refused = reads(it.store, truth)
    if it.part.kind == "config":
        assert bool(refused) == bool(it.changed)
        return
    found = findings(it.store)
    if not it.changed or it.part.kind in EMPTY_ON_PURPOSE:
        assert not found and not refused
    elif (it.part.kind, it.way) in UNFINDABLE:
        assert not found
    elif found:
        assert any(name in f"{one.subject} {one.detail}" for one in found for name in names(it, world)), found
    else:  # only what no ref needs, what was pruned, or a copy that was known to be damaged
        pruned = marks.pruned(world)
        assert all(text.partition(": ")[0] in pruned for text in refused), refused
        is_written_off = it.part.kind == "page" and it.changed <= {key for key, _ in marks.read(world)}
        is_noticed = it.way is Way.DELETE or it.part.kind == "manifest" or is_written_off or refused
        assert is_noticed, f"nobody noticed: {it}"


# -- healing -------------------------------------------------------------------------------------------------------


def heal_by_put(store: Store, truth: Truth, _: Store) -> None:
    """The sessions are snapshot again: the same content comes in."""
    with Repository.open(store) as repo:
        for data in truth.pages.values():
            repo.put_pages(data)


def heal_by_repair(store: Store, _: Truth, whole: Store) -> None:
    with Repository.open(store) as repo, Repository.open(whole) as source:
        mending.apply(repo, repair.plan(repo, source=source), source=source)


def heal_by_push(store: Store, _: Truth, whole: Store) -> None:
    with Repository.open(store) as repo, Repository.open(whole) as source:
        transfer.apply(source, repo, transfer.plan(source, repo, everything=True, heal=True))


def heal_by_mending_refs(store: Store, truth: Truth, _: Store) -> None:
    """Somebody says what each unreadable ref shall name; one that named nothing any more is deleted again."""
    with Repository.open(store) as repo:
        for kind in RefKind:
            for name in repo.refs.names(kind):
                try:
                    repo.refs.read(kind, name)
                except IntegrityError:
                    repo.mend_ref(kind, name, truth.refs.get((kind, name), truth.refs[RefKind.BRANCH, "main"]))
                    if (kind, name) not in truth.refs:
                        repo.delete_ref(kind, name)


def heals(it: Case, truth: Truth, seed: int) -> Callable[[Store, Truth, Store], None]:
    """The ways out that docs/promises.md names for what was hit, in turn."""
    ways = [heal_by_repair, heal_by_push]
    if it.part.kind in ("page", "index", "footer"):
        ways.append(heal_by_put)
    elif it.part.kind in ("branch", "tag"):
        named = {f"{kind}{name}.ref" for kind, name in truth.refs}
        ways = [heal_by_mending_refs] if it.way is not Way.DELETE else []
        ways += [heal_by_push] if it.changed <= named else []
        ways = ways or [heal_by_repair]  # nothing is left to be mended: a deleted name is free again
    return ways[seed // 2 % len(ways)]


def check_healed(it: Case, world: MemoryStore, truth: Truth, seed: int) -> None:
    if it.part.kind == "config":
        it.store.put(CONFIG, world.get(CONFIG))  # the one object to keep a copy of; see docs/promises.md
    heal = heals(it, truth, seed)
    heal(it.store, truth, copy(world))
    pruned = marks.pruned(world)
    assert all(text.partition(": ")[0] in pruned for text in reads(it.store, truth)), heal
    with Repository.open(it.store) as repo:
        report = fsck.check(repo)
        assert report.is_whole, (heal, report.findings)
        assert fsck.Code.DAMAGED_SIGNATURE not in {one.code for one in report.findings}, (heal, report.findings)


def run(store: Store, world: MemoryStore, truth: Truth, seed: int) -> None:
    it = case(store, seed)
    unread = MemoryStore()
    unread.put_many([(info.key, store.get(info.key)) for info in store.list()], mode="create")
    check_found(it, world, truth)
    if heals(it, truth, seed) is heal_by_push:  # it finds by itself what nobody has met; a read leaves marks
        it = replace(it, store=unread)
    check_healed(it, world, truth, seed)


@pytest.mark.parametrize("seed", range(0, 500, 9))
def test_damage(world: MemoryStore, truth: Truth, seed: int) -> None:
    run(copy(world), world, truth, seed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_damage_in_five_hundred_cases(world: MemoryStore, truth: Truth) -> None:
    for seed in range(500):
        run(copy(world), world, truth, seed)


@pytest.mark.parametrize("seed", range(5, 500, 31))
def test_damage_on_disk(world: MemoryStore, truth: Truth, tmp_path: Path, seed: int) -> None:
    store = LocalStore(tmp_path, durable=False)
    store.put_many([(info.key, world.get(info.key)) for info in world.list()], mode="create")
    run(store, world, truth, seed)


def test_every_kind_of_bytes_is_hit_in_every_way(world: MemoryStore) -> None:
    hit = collections.Counter((it.part.kind, it.way) for it in (case(copy(world), seed) for seed in range(500)))
    kinds = {*KINDS.values(), "page", "index", "footer"}
    kinds -= set() if any(world.list("signatures/")) else {"signature"}
    assert hit.keys() == {(kind, way) for kind in kinds for way in Way}
    assert min(hit.values()) >= 5
