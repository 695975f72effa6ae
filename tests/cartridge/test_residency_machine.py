"""Residency against a model of it: a list of what is resident, oldest first, and nothing clever."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from kvist.cartridge.lease import Lease
from kvist.cartridge.residency import Residency
from kvist.errors import CartridgeTooLarge, DamagedCartridge, ResidencyFull

CAPACITY = 20
KEYS = st.sampled_from([(name, size) for name in "abc" for size in (0, 1, 3, 7, 20, 21)])
Key = tuple[str, int]


@dataclass(eq=False)
class Loaded:
    """A value, and what the model knows of it."""

    key: Key
    refs: int = 0
    is_pinned: bool = False
    is_released: bool = False


@dataclass
class Model:
    """What should be resident, least recently used first, and what was evicted by force and is still used."""

    resident: list[Loaded] = field(default_factory=list)
    used: list[Loaded] = field(default_factory=list)

    def find(self, key: Key) -> Loaded | None:
        return next((one for one in self.resident if one.key == key), None)

    @property
    def bytes(self) -> int:
        return sum(one.key[1] for one in self.resident + self.used)

    def touch(self, one: Loaded) -> None:
        self.resident.remove(one)
        self.resident.append(one)

    def make_room(self, size: int) -> list[Loaded] | None:
        """What has to go; of what could, the newest stays where it fits."""
        idle = [one for one in self.resident if not one.refs and not one.is_pinned]
        surplus = CAPACITY - self.bytes + sum(one.key[1] for one in idle) - size
        if surplus < 0:
            return None
        gone = []
        for one in reversed(idle):
            if one.key[1] <= surplus:
                surplus -= one.key[1]
            else:
                gone.append(one)
        return gone


class ResidencyMachine(RuleBasedStateMachine):
    """Acts on both, and compares everything that can be seen."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.fails: str | None = None
        self.counts = {"hits": 0, "misses": 0, "loads": 0, "failures": 0, "refusals": 0}
        self.residency: Residency[Loaded] = Residency(
            CAPACITY, self.load, lambda key: key[1], self.release, check=self.check
        )

    def check(self, key: Key) -> None:
        if self.fails == "check":
            raise DamagedCartridge(str(key))

    def load(self, key: Key) -> Loaded:
        assert self.residency.metrics().resident_bytes + key[1] <= CAPACITY
        if self.fails == "load":
            raise OSError(str(key))
        return Loaded(key)

    def release(self, one: Loaded) -> None:
        assert not one.is_released
        assert not one.refs
        one.is_released = True

    def bring_in(self, key: Key, fails: str | None) -> type[Exception] | None:
        """What the model says of a load: which error it ends with."""
        gone = self.model.make_room(key[1])
        if gone is None:
            self.counts["refusals"] += 1
            return CartridgeTooLarge if key[1] > CAPACITY else ResidencyFull
        if fails == "check":
            self.counts["failures"] += 1
            return DamagedCartridge
        for one in gone:
            self.model.resident.remove(one)
        if fails == "load":
            self.counts["failures"] += 1
            return OSError
        self.counts["loads"] += 1
        return None

    @rule(target=leases, key=KEYS, fails=st.sampled_from([None, None, None, "check", "load"]))
    def acquire(self, key: Key, fails: str | None) -> tuple[Lease[Loaded], Loaded] | None:
        self.fails = fails
        known = self.model.find(key)
        self.counts["misses" if known is None else "hits"] += 1
        expected = self.bring_in(key, fails) if known is None else None
        try:
            lease = self.residency.acquire(key)
        except (ResidencyFull, DamagedCartridge, OSError) as error:
            assert type(error) is expected
            return None
        assert expected is None
        if known is None:
            known = lease.value
            self.model.resident.append(known)
        assert lease.value is known
        self.model.touch(known)
        known.refs += 1
        return lease, known

    @rule(held=consumes(leases), again=st.booleans())
    def close(self, held: tuple[Lease[Loaded], Loaded] | None, again: bool) -> None:
        if held is None:
            return
        lease, one = held
        one.refs -= 1
        if one in self.model.used and not one.refs:
            self.model.used.remove(one)
        lease.close()
        if again:
            lease.close()

    @rule(key=KEYS, fails=st.sampled_from([None, None, None, "check", "load"]))
    def prefetch(self, key: Key, fails: str | None) -> None:
        self.fails = fails
        if self.model.find(key) is not None:
            assert self.residency.prefetch(key)
            return
        expected = self.bring_in(key, fails)
        try:
            is_there = self.residency.prefetch(key)
        except (DamagedCartridge, OSError) as error:
            assert type(error) is expected
            return
        assert is_there == (expected is None)
        if is_there:
            with self.residency.acquire(key) as lease:
                self.model.resident.append(lease.value)
            self.counts["hits"] += 1

    @rule(key=KEYS, is_pinned=st.booleans())
    def pin(self, key: Key, is_pinned: bool) -> None:
        one = self.model.find(key)
        assert (self.residency.pin if is_pinned else self.residency.unpin)(key) == (one is not None)
        if one is not None:
            one.is_pinned = is_pinned

    @rule(key=KEYS, force=st.booleans())
    def evict(self, key: Key, force: bool) -> None:
        one = self.model.find(key)
        goes = one is not None and (force or not (one.refs or one.is_pinned))
        assert self.residency.evict(key, force=force) == goes
        if one is not None and goes:
            self.model.resident.remove(one)
            self.model.used += [one] if one.refs else []
            assert one.is_released == (not one.refs)

    @invariant()
    def all_that_can_be_seen_agrees(self) -> None:
        resident = self.model.resident
        assert self.residency.lru_order() == [one.key for one in resident]
        assert all(self.residency.refs(one.key) == one.refs for one in resident)
        assert not any(one.is_released for one in resident + self.model.used)
        metrics = self.residency.metrics()
        assert {name: getattr(metrics, name) for name in self.counts} == self.counts
        assert metrics.resident_bytes == metrics.bytes_loaded - metrics.bytes_evicted == self.model.bytes <= CAPACITY
        assert (metrics.reserved_bytes, metrics.waits) == (0, 0)
        assert metrics.resident == len(resident)
        assert metrics.in_use == sum(one.refs > 0 for one in resident)
        assert metrics.pinned == sum(one.is_pinned for one in resident)

    def teardown(self) -> None:
        self.residency.close()
        still_used = [one for one in self.model.resident + self.model.used if one.refs]
        assert self.residency.resident_bytes == sum(one.key[1] for one in still_used)


TestResidency = ResidencyMachine.TestCase
TestResidency.settings = settings(max_examples=150, stateful_step_count=40)
