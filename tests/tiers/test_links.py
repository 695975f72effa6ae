"""Links: equal shares, exact ends, one clock."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.errors import Conflict, InvalidInput
from kvist.tiers.links import Link, Network

MB = 1_000_000


class Ends:
    """Starts transfers, and writes down when each ended."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.seen: list[tuple[str, float]] = []

    def start(self, link: Link, nbytes: int, name: str) -> None:
        link.start(nbytes, lambda: self.seen.append((name, self.network.now)))


def test_a_network_without_transfers():
    network = Network()
    link = network.link(1.0)
    assert network.deadline() is None
    network.advance(5.0)
    assert network.now == 5.0
    assert link.active == 0


def test_one_megabyte_at_one_gigabyte_a_second_takes_a_millisecond():
    network = Network()
    link = network.link(1.0)
    ends = Ends(network)
    ends.start(link, MB, "a")
    assert network.deadline() == 1.0
    network.advance(math.nextafter(1.0, 0))
    assert ends.seen == []
    assert link.active == 1
    network.advance(1.0)
    assert ends.seen == [("a", 1.0)]
    assert network.deadline() is None


def test_two_at_once_take_two_milliseconds_each():
    network = Network()
    link = network.link(1.0)
    ends = Ends(network)
    ends.start(link, MB, "a")
    ends.start(link, MB, "b")
    assert network.deadline() == 2.0
    network.advance(2.0)
    assert ends.seen == [("a", 2.0), ("b", 2.0)]


def test_a_second_that_starts_half_way_delays_the_first():
    network = Network()
    link = network.link(1.0)
    ends = Ends(network)
    ends.start(link, MB, "a")
    network.advance(0.5)
    ends.start(link, MB, "b")
    network.advance(10.0)
    assert ends.seen == [("a", 1.5), ("b", 2.0)]
    assert network.now == 10.0


def test_a_smaller_one_overtakes():
    network = Network()
    link = network.link(1.0)
    ends = Ends(network)
    ends.start(link, 3 * MB, "large")
    ends.start(link, MB, "small")
    network.advance(10.0)
    assert ends.seen == [("small", 2.0), ("large", 4.0)]


def test_links_do_not_slow_each_other():
    network = Network()
    ends = Ends(network)
    ends.start(network.link(1.0), MB, "down")
    ends.start(network.link(2.0), MB, "up")
    network.advance(1.0)
    assert ends.seen == [("up", 0.5), ("down", 1.0)]


def test_equal_ends_go_by_the_age_of_the_link():
    network = Network()
    old, new = network.link(1.0), network.link(1.0)
    ends = Ends(network)
    ends.start(new, MB, "new")
    ends.start(old, MB, "old")
    network.advance(1.0)
    assert [name for name, _ in ends.seen] == ["old", "new"]


def test_without_bandwidth_limits_a_transfer_ends_at_the_next_advance():
    network = Network(3.0)
    link = network.link(math.inf)
    ends = Ends(network)
    ends.start(link, MB, "a")
    ends.start(link, 2 * MB, "b")
    assert ends.seen == []
    assert network.deadline() == 3.0
    network.advance(3.0)
    assert ends.seen == [("a", 3.0), ("b", 3.0)]


def test_nothing_ends_at_once():
    network = Network()
    link = network.link(1.0)
    ends = Ends(network)
    ends.start(link, 0, "empty")
    network.advance(0.0)
    assert ends.seen == [("empty", 0.0)]


def test_latency_takes_no_bandwidth():
    network = Network()
    link = network.link(1.0, latency_ms=5.0)
    ends = Ends(network)
    ends.start(link, MB, "a")
    assert network.deadline() == 6.0
    network.advance(1.0)  # a's last byte was sent
    ends.start(link, MB, "b")
    assert link.active == 2
    network.advance(20.0)
    assert ends.seen == [("a", 6.0), ("b", 7.0)]


def test_what_a_callback_starts_begins_when_its_transfer_ended():
    network = Network()
    up, down = network.link(1.0), network.link(1.0)
    ends = Ends(network)
    up.start(MB, lambda: ends.start(down, MB, "second stage"))
    network.advance(10.0)
    assert ends.seen == [("second stage", 2.0)]


def test_an_error_in_a_callback_ends_that_transfer_alone():
    network = Network()
    link = network.link(1.0)
    ends = Ends(network)

    def fail() -> None:
        raise ValueError("sink")

    link.start(MB, fail)
    ends.start(link, MB, "other")
    with pytest.raises(ValueError, match="sink"):
        network.advance(10.0)
    assert network.now == 2.0
    network.advance(10.0)
    assert ends.seen == [("other", 2.0)]


def test_a_callback_cannot_advance_time():
    network = Network()
    network.link(1.0).start(MB, lambda: network.advance(5.0))
    with pytest.raises(Conflict, match="callback"):
        network.advance(2.0)
    network.advance(2.0)
    assert network.now == 2.0


@pytest.mark.parametrize("gb_per_s", [0, -1.0, math.nan])
def test_a_bandwidth_is_above_zero(gb_per_s: float):
    with pytest.raises(InvalidInput, match="gb_per_s"):
        Network().link(gb_per_s)


@pytest.mark.parametrize("latency", [-1.0, math.inf, math.nan])
def test_a_latency_is_finite(latency: float):
    with pytest.raises(InvalidInput, match="latency_ms"):
        Network().link(1.0, latency_ms=latency)


@pytest.mark.parametrize("now", [1.0, math.inf, math.nan])
def test_time_goes_on(now: float):
    network = Network(2.0)
    with pytest.raises(InvalidInput, match=r"2\.0 ms"):
        network.advance(now)
    assert network.now == 2.0


def test_sizes_are_not_negative():
    link = Network().link(1.0)
    with pytest.raises(InvalidInput, match="-1"):
        link.start(-1, lambda: None)
    assert link.active == 0


starts = st.lists(
    st.tuples(st.floats(0, 3), st.integers(0, 2), st.integers(0, 5 * MB)), max_size=12
)  # (pause, link, bytes)


@given(starts, st.lists(st.floats(0, 3), max_size=12), st.sampled_from([0.0, 0.7]))
def test_ends_do_not_depend_on_how_often_time_is_told(
    plan: list[tuple[float, int, int]], looks: list[float], latency: float
):
    def run(looks: list[float]) -> list[tuple[str, float]]:
        network = Network()
        links = [network.link(rate, latency_ms=latency) for rate in (1.0, 3.0, math.inf)]
        ends = Ends(network)
        at = 0.0
        moments = sorted(looks)
        for number, (pause, link, nbytes) in enumerate(plan):
            at += pause
            while moments and moments[0] <= at:
                network.advance(moments.pop(0))
            network.advance(at)
            ends.start(links[link], nbytes, str(number))
        while (deadline := network.deadline()) is not None:
            network.advance(deadline)
        assert sorted(int(name) for name, _ in ends.seen) == list(range(len(plan)))
        assert all(link.active == 0 and link.ended_bytes == link.started_bytes for link in links)
        assert sum(link.started_bytes for link in links) == sum(nbytes for _, _, nbytes in plan)
        return ends.seen

    assert run(looks) == run([])


@given(st.lists(st.integers(0, 5 * MB), min_size=1, max_size=10))
def test_a_busy_link_loses_no_time(sizes: list[int]):
    network = Network()
    link = network.link(2.0)
    ends = Ends(network)
    for number, nbytes in enumerate(sizes):
        ends.start(link, nbytes, str(number))
    while (deadline := network.deadline()) is not None:
        network.advance(deadline)
    assert network.now == pytest.approx(sum(sizes) / (2 * MB))
    assert [int(name) for name, _ in ends.seen] == sorted(range(len(sizes)), key=lambda n: (sizes[n], n))


@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 5 * MB)), max_size=10))
def test_ends_are_those_of_exact_arithmetic(plan: list[tuple[int, int]]):
    """The same rule, in fractions: between two changes, all that is on the link gets the same part of it."""
    network = Network()
    link = network.link(1.0)
    ends = Ends(network)
    left: dict[str, Fraction] = {}
    exact: dict[str, Fraction] = {}

    def pass_until(now: Fraction, until: Fraction | None) -> Fraction:
        while left and (until is None or now < until):
            name = min(left, key=lambda each: left[each])
            step = left[name] * len(left) / MB
            if until is not None:
                step = min(step, until - now)
            now += step
            for each in left:
                left[each] -= step * MB / len(left)
            for each in [each for each, size in left.items() if size == 0]:
                exact[each] = now
                del left[each]
        return now if until is None else until

    at = Fraction(0)
    for number, (pause, nbytes) in enumerate(plan):
        at = pass_until(at, at + Fraction(pause, 1000))
        network.advance(float(at))
        ends.start(link, nbytes, str(number))
        left[str(number)] = Fraction(nbytes)
        if nbytes == 0:
            del left[str(number)]
            exact[str(number)] = at
    pass_until(at, None)
    while (deadline := network.deadline()) is not None:
        network.advance(deadline)
    assert dict(ends.seen) == {name: pytest.approx(float(end)) for name, end in exact.items()}
