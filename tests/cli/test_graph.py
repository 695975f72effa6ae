"""`kvist log --graph`, line by line."""

from __future__ import annotations

import random
import textwrap

import pytest

from kvist.cli.graph import draw
from kvist.repo.lineage import lanes


def drawn(order: str, parents: dict[str, str]) -> str:
    def of(cid: str) -> list[str]:
        return parents.get(cid, "").split()

    lines = draw(lanes(order.split(), of), of)
    return "\n".join(art if cid is None else f"{art} {cid}" for art, cid in lines)


def golden(text: str) -> str:
    return textwrap.dedent(text).strip("\n")


def test_a_line() -> None:
    expected = """
        * C
        * B
        * A
    """
    assert drawn("C B A", {"C": "B", "B": "A"}) == golden(expected)


def test_a_fork_of_three() -> None:
    expected = """
        * D
        | * C
        |/
        | * B
        |/
        * A
    """
    assert drawn("D C B A", {"D": "A", "C": "A", "B": "A"}) == golden(expected)


def test_forks_of_which_some_went_on() -> None:
    expected = """
        * F
        | * E
        * | D
        | | * C
        | |/
        | * B
        |/
        * A
    """
    assert drawn("F E D C B A", {"F": "D", "E": "B", "D": "A", "C": "B", "B": "A"}) == golden(expected)


def test_a_join_across_a_lane() -> None:
    expected = """
        * E
        | * D
        | | * C
        |_|/
        | * B
        |/
        * A
    """
    assert drawn("E D C B A", {"E": "A", "D": "B", "C": "A", "B": "A"}) == golden(expected)


def test_twelve_forks() -> None:
    forks = [f"f{i}" for i in range(12)]
    expected = ["* f0"]
    for fork in forks[1:]:
        expected += [f"| * {fork}", "|/"]
    expected += ["* A"]
    assert drawn(" ".join([*forks, "A"]), dict.fromkeys(forks, "A")) == "\n".join(expected)


def test_twelve_forks_that_went_on() -> None:
    order = [f"t{i}" for i in range(12)] + [f"f{i}" for i in range(12)] + ["A"]
    parents = {f"t{i}": f"f{i}" for i in range(12)} | {f"f{i}": "A" for i in range(12)}
    text = drawn(" ".join(order), parents).splitlines()
    assert text[:3] == ["* t0", "| * t1", "| | * t2"]
    assert text[11] == "| | | | | | | | | | | * t11"
    assert text[12:14] == ["* | | | | | | | | | | | f0", "| * | | | | | | | | | | f1"]
    assert text[14] == "|/  | | | | | | | | | |"
    assert text[15:17] == ["|   * | | | | | | | | | f2", "|__/  | | | | | | | | |"]
    assert text[-3:] == ["|                     * f11", "|____________________/", "* A"]


def test_a_merge() -> None:
    expected = r"""
        * M
        |\
        * | C
        | * B
        |/
        * A
    """
    assert drawn("M C B A", {"M": "C B", "C": "A", "B": "A"}) == golden(expected)


def test_a_merge_of_three() -> None:
    expected = r"""
        * M
        |\
        |\|_
        * | | D
        | * | C
        |/  |
        |   * B
        |__/
        * A
    """
    assert drawn("M D C B A", {"M": "D C B", "D": "A", "C": "A", "B": "A"}) == golden(expected)


def test_a_merge_of_a_lane_further_right() -> None:
    expected = r"""
        * Z
        | * Y
        | | * X
        * | | M
        |\|_|
        * | | C
        | * | B
        |/  |
        |   * A
        |__/
        * R
    """
    parents = {"Z": "M", "Y": "B", "X": "A", "M": "C A", "C": "R", "B": "R", "A": "R"}
    assert drawn("Z Y X M C B A R", parents) == golden(expected)


def test_an_unrelated_root_is_set_apart() -> None:
    assert drawn("B A", {}) == "* B\n\n* A"
    expected = """
        * D
        | * C
        |
        | * B
        |/
        * A
    """
    assert drawn("D C B A", {"D": "A", "B": "A"}) == golden(expected)


def test_nothing() -> None:
    assert drawn("", {}) == ""


def test_a_cut_graph_keeps_its_open_lanes() -> None:
    assert drawn("C B", {"C": "A", "B": "A"}) == "* C\n| * B\n|/"


@pytest.mark.parametrize("seed", range(30))
def test_any_graph_draws_every_node_once_below_a_stroke_of_its_lane(seed: int) -> None:
    rng = random.Random(seed)
    names = [f"n{i}" for i in range(20)]
    parents = {
        name: " ".join(rng.sample(names[i + 1 :], min(rng.choice([0, 1, 1, 1, 2, 3]), 19 - i)))
        for i, name in enumerate(names)
    }

    def of(cid: str) -> list[str]:
        return parents[cid].split()

    rows = {row.cid: row for row in lanes(names, of)}
    lines = list(draw(rows.values(), of))
    assert [line.cid for line in lines if line.cid is not None] == names
    for above, (art, cid) in zip(["", *(line.art for line in lines)], lines, strict=False):
        assert art == art.rstrip()
        if cid is None:
            assert "*" not in art
            continue
        place = 2 * rows[cid].lane
        assert art[place] == "*" and art.count("*") == 1
        if any(cid in of(name) for name in names):  # something leads here: straight down, or in from a side
            assert set(above.ljust(60)[max(0, place - 1) : place + 2]) & set("|*/\\_"), (above, art)
