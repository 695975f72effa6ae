import itertools

from hypothesis import given
from hypothesis import strategies as st

from kvist.store import Range
from kvist.store.ranges import runs
from kvist.testing.store_races import content

WINDOW = 1 << 20
spans = st.lists(st.tuples(st.integers(0, 700_000), st.integers(0, 3_000_000)), max_size=8)


@given(spans)
def test_every_byte_is_asked_for_once_in_requests_of_bounded_size(gaps_and_sizes: list[tuple[int, int]]) -> None:
    position, ranges = 0, []
    for gap, size in gaps_and_sizes:
        position += gap
        ranges.append(Range(position, memoryview(bytearray(size))))
        position += size
    data = content(position)
    found = runs(ranges, WINDOW)
    assert all(0 < run.end - run.start <= WINDOW for run in found)
    assert all(one.end <= two.start for one, two in itertools.pairwise(found))
    for run in found:
        assert run.ranges[0].start == run.start
        for r in run.ranges:
            assert run.start <= r.start and r.start + len(r.out) <= run.end
            r.out[:] = data[r.start : r.start + len(r.out)]
    for r in ranges:
        assert r.out == data[r.start : r.start + len(r.out)]


def test_near_ranges_share_a_request_and_far_ones_do_not() -> None:
    def spans(*pairs: tuple[int, int]) -> list[tuple[int, int]]:
        found = runs([Range(start, memoryview(bytearray(size))) for start, size in pairs], WINDOW)
        return [(run.start, run.end) for run in found]

    assert spans() == []
    assert spans((5, 0)) == []
    assert spans((0, 10), (10, 10), (100, 5)) == [(0, 105)]
    assert spans((0, 10), (300_000, 10)) == [(0, 10), (300_000, 300_010)]
    assert spans((0, WINDOW), (WINDOW, 1)) == [(0, WINDOW), (WINDOW, WINDOW + 1)]
    assert spans((0, 2 * WINDOW + 1)) == [(0, WINDOW), (WINDOW, 2 * WINDOW), (2 * WINDOW, 2 * WINDOW + 1)]
