"""`kvist fork`, `branch` and `tag`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvist.ids import short
from kvist.repo import Ref, RefKind
from kvist.repo.refs import Refs

from .conftest import Graph, Kvist


@pytest.fixture
def two(graph: Graph) -> tuple[str, str]:
    """Snapshots A and B, branch ``main`` at A."""
    a = graph.add("A", branch="main")
    return a, graph.add("B", "A", branch="next")


def damage(kvist: Kvist, kind: RefKind, name: str) -> None:
    (kvist.root / kind.value / f"{name}.ref").write_bytes(b"{")


# -- fork --------------------------------------------------------------------------------------------------------


def test_fork(kvist: Kvist, two: tuple[str, str]) -> None:
    made = kvist.ok("fork", "main", "-n", "3", "--name", "try", "--json").json
    assert made["source"] == two[0]
    assert [fork["branch"] for fork in made["forks"]] == ["try/0", "try/1", "try/2"]
    assert len({fork["cid"] for fork in made["forks"]}) == 3
    assert kvist.ok("show", "try/1", "--json").json["parents"] == [two[0]]
    assert len(kvist.ok("fork", "main", "-n", "2", "-q").lines) == 2
    lines = kvist.ok("fork", "main", "-n", "1", "--name", "more").lines
    assert [line.split()[0] for line in lines] == ["branch", "more/0"]


@pytest.mark.parametrize(
    ("words", "code", "kind"),
    [
        (["-n", "0"], 2, "invalid_input"),
        (["-n", "10001"], 2, "invalid_input"),
        (["-n", "x"], 2, "usage"),
        ([], 2, "usage"),
        (["-n", "1", "--name", "../x"], 2, "invalid_name"),
        (["-n", "1", "--name", "taken"], 5, "already_exists"),
    ],
)
def test_fork_refused(kvist: Kvist, two: tuple[str, str], words: list[str], code: int, kind: str) -> None:
    kvist.ok("branch", "taken/0", "main")
    ran = kvist("fork", "main", *words, "--json")
    assert (ran.code, ran.error["kind"], ran.error["exit_code"]) == (code, kind, code)
    assert kvist.ok("branch", "-q").lines == ["main", "next", "taken/0"]


# -- branch ------------------------------------------------------------------------------------------------------


def test_life_of_a_branch(kvist: Kvist, two: tuple[str, str]) -> None:
    a, b = two
    assert kvist.ok("branch", "work", "main").out == f"branch work names {a}\n"
    assert kvist.ok("branch", "work", "--json").json == {"kind": "branch", "name": "work", "cid": a}
    ran = kvist("branch", "work", "next")
    assert ran.code == 5 and ran.err.endswith("hint: kvist branch --move work next\n")
    assert kvist.ok(*ran.err.split("hint: kvist ")[1].split()).out == f"branch work names {b}\n"
    rows = [f"{name:<6}  {short(cid)}" for name, cid in [("main", a), ("next", b), ("work", b)]]
    assert kvist.ok("branch").lines == ["branch  snapshot", *rows]
    assert kvist.ok("branch", "-q").lines == ["main", "next", "work"]
    assert kvist.ok("branch", "--delete", "work").out == f"branch work is deleted; it named {b}\n"
    assert kvist("branch", "--delete", "work").code == 4
    assert kvist("branch", "work").code == 4
    assert kvist.ok("branch", "--move", "work", "main", "-q").out == "work\n"  # the name is free again
    assert [ref["name"] for ref in kvist.ok("branch", "--json").json["refs"]] == ["main", "next", "work"]


def test_a_branch_that_moves_meanwhile(kvist: Kvist, two: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    read: Callable[..., Ref | None] = Refs.read

    def read_then_move(self: Refs, kind: RefKind, name: str) -> Ref | None:
        found = read(self, kind, name)
        if found is not None and name == "main":
            self.move(found, two[1])
        return found

    monkeypatch.setattr(Refs, "read", read_then_move)
    for words in (["branch", "--move", "main", two[0]], ["branch", "--delete", "main"]):
        ran = kvist(*words, "--json")
        assert (ran.code, ran.error["kind"]) == (11, "conflict")
        assert ran.error["hint"] == "read it again and retry"
    monkeypatch.undo()
    assert kvist.ok("branch", "main", "--json").json["cid"] == two[1]


# -- tag ---------------------------------------------------------------------------------------------------------


def test_life_of_a_tag(kvist: Kvist, two: tuple[str, str]) -> None:
    a, _ = two
    assert kvist.ok("tag").out == ""
    assert kvist.ok("tag", "v1", "main").out == f"tag v1 names {a}\n"
    assert kvist.ok("tag", "v1", "-q").out == "v1\n"
    assert kvist.ok("tag", "--json").json == {"refs": [{"kind": "tag", "name": "v1", "cid": a}]}
    ran = kvist("tag", "v1", "next", "--json")
    assert (ran.code, ran.error["kind"]) == (5, "already_exists")
    assert kvist.ok("tag", "--delete", "v1", "--json").json["cid"] == a
    ran = kvist("tag", "v1", "main")
    assert ran.code == 5 and "a tag's name is never used again" in ran.err
    assert kvist.ok("tag", "-q").out == ""


def test_a_name_alone_that_names_nothing(kvist: Kvist, two: tuple[str, str]) -> None:
    for noun in ("branch", "tag"):
        ran = kvist(noun, "v1")
        assert (ran.code, ran.err) == (4, f"error: there is no {noun} v1\nhint: to make it: kvist {noun} v1 REV\n")


@pytest.mark.parametrize("kind", list(RefKind))
def test_mending_an_unreadable_record(kvist: Kvist, two: tuple[str, str], kind: RefKind) -> None:
    kvist.ok(kind.noun, "x", "main")
    ran = kvist(kind.noun, "--mend", "x", two[1], "--json")
    assert (ran.code, ran.error["kind"]) == (5, "already_exists")
    damage(kvist, kind, "x")
    ran = kvist(kind.noun, "x", "--json")
    assert (ran.code, ran.error["kind"]) == (20, "damaged_object")
    assert f"kvist {kind.noun} --mend x CID" in ran.error["hint"]
    assert kvist("fsck").code == 3
    assert kvist(kind.noun, "--mend", "x", "sha256:" + "0" * 64).code == 4
    assert kvist.ok(kind.noun, "--mend", "x", two[1]).out == f"{kind.noun} x is mended; it names {two[1]}\n"
    assert kvist.ok(kind.noun, "x", "--json").json["cid"] == two[1]
    kvist.ok("fsck")


@pytest.mark.parametrize(
    "words",
    [
        ["tag", "--delete", "a", "b"],
        ["tag", "--mend", "--delete", "a"],
        ["tag", "--mend", "a"],
        ["branch", "--mend", "--move", "a", "b"],
        ["branch", "--move", "a"],
        ["branch", "a", "b", "c"],
    ],
)
def test_words_without_sense(kvist: Kvist, words: list[str]) -> None:
    ran = kvist(*words)
    assert ran.code == 2 and ran.out == "" and "Usage: kvist" in ran.err
    assert kvist(*words, "--json").error["kind"] == "usage"


@pytest.mark.parametrize("name", ["../x", "a//b", ".x", "x.lock", "0" * 64, "é", "a\nb"])
def test_names_that_are_not_allowed(kvist: Kvist, two: tuple[str, str], name: str) -> None:
    before: Any = sorted(kvist.root.rglob("*"))
    for words in (["branch", name, "main"], ["tag", name, "main"], ["tag", "--delete", name], ["branch", name]):
        ran = kvist(*words, "--json")
        assert (ran.code, ran.error["kind"]) == (2, "invalid_name"), words
    assert sorted(kvist.root.rglob("*")) == before
