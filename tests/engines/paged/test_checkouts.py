"""Which of the snapshots that are checked out a request takes, and which go."""

from __future__ import annotations

import pytest

from kvist.engines.paged.checkouts import CHECKOUTS_MAX, Checkouts
from kvist.engines.paged.matching import Checkout, Stored
from kvist.engines.paged.plans import SequencePlan
from kvist.engines.paged.requests import digest, newest, sequence_id, told_apart
from kvist.errors import NotFound

SIZE = 4
IDS = list(range(12))
NAMES = [bytes([number]) for number in range(3)]


def made(*snapshots: tuple[str, int, str | None]) -> Checkouts:
    """Snapshots ``(content, tokens, salt)`` of sequences that begin as `IDS`, each with its full blocks."""
    checkouts = Checkouts([None], SIZE)
    for content, tokens, salt in snapshots:
        state = {} if salt is None else {"salt": digest(salt)}
        by_hash = [{name: ix for ix, name in enumerate(NAMES[: tokens // SIZE])}]
        stored = Stored("seq", IDS[: tokens + 1], tokens, [list(range(-(-tokens // SIZE)))], state)
        checkouts.add(f"cid-{content}", content, by_hash, [stored])
    return checkouts


def taken(checkouts: Checkouts, *, local: int = 0, own: str | None = None) -> tuple[str, int, bool] | None:
    def reach(checkout: Checkout | None) -> int:
        return local if checkout is None else 0

    found = checkouts.best(IDS, NAMES, own, reach)
    return None if found is None else (found.checkout.content, found.tokens, found.stored is not None)


def test_the_one_with_the_most_tokens() -> None:
    checkouts = made(("short", 5, None), ("long", 10, None), ("middle", 7, None))
    assert taken(checkouts) == ("long", 10, True)
    assert taken(checkouts, local=10) == ("long", 10, True)  # on a tie, too
    assert taken(checkouts, local=11) is None


def test_of_two_the_last_one() -> None:
    assert taken(made(("first", 6, None), ("second", 6, None))) == ("second", 6, True)


def test_what_is_in_place_under_its_salt_counts() -> None:
    checkouts = made(("short", 5, None), ("long", 8, None))

    def reach(checkout: Checkout | None) -> int:
        return 10 if checkout is not None and checkout.content == "short" else 0

    found = checkouts.best(IDS, NAMES, None, reach)
    assert found is not None and found.checkout.content == "short"


def test_another_tenants_sequence_is_none() -> None:
    checkouts = made(("theirs", 10, "a"))
    assert taken(checkouts, own="a") == ("theirs", 10, True)
    assert taken(checkouts, own="b") == ("theirs", 8, False)  # by blocks, whose hashes hold the salt


def test_one_that_nobody_named_for_long_goes() -> None:
    checkouts = made(*((str(number), 6, None) for number in range(CHECKOUTS_MAX)))
    assert checkouts.named("cid-0", "seq", lambda stored: stored.cached == 6) is not None
    assert checkouts.named("cid-1", "seq", lambda stored: False) is None  # another tenant's name is no use of it
    assert checkouts.named("cid-1", "other", lambda stored: True) is None
    assert checkouts.named(["cid-1"], None, lambda stored: True) is None
    assert checkouts.add("cid-new", "new", [{}], []) == ["1"]
    assert checkouts.content("cid-0") == "0"
    with pytest.raises(NotFound, match="cid-1 is not checked out"):
        checkouts.content("cid-1")
    assert checkouts.add("again", "2", [{}], []) == []  # its content is still another's
    assert len(checkouts) == CHECKOUTS_MAX and "cid-2" not in checkouts.cids


def test_names_of_requests() -> None:
    assert sequence_id("talk") == "talk" and sequence_id("no name\n").startswith("request-")
    same = [SequencePlan("a", str(number), [], 0, [], {}) for number in range(3)]
    assert [each.id for each in told_apart(same)] == ["a", "a.2", "a.3"]
    assert newest([("a", 2), ("b", 1), ("a", 1)], lambda each: each[0]) == [("a", 2), ("b", 1)]
