"""`kvist init`, `stats`, `fsck` and `gc`."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvist.repo.segment import PREFIX as SEGMENTS

from .conftest import LAYOUT, Graph, Kvist, half, put_manifest, run

LOCK = "locks/gc"


@pytest.fixture
def filled(kvist: Kvist) -> Kvist:
    """Branches ``a`` and ``b`` with a snapshot each, in a segment each."""
    with kvist.opened() as repo:
        repo.commit([put_manifest(repo, 0, 2)], branch="a")
        repo.commit([put_manifest(repo, 10, 3)], branch="b")
    return kvist


def segment_of(kvist: Kvist, page: bytes) -> Path:
    return next(path for path in (kvist.root / SEGMENTS).iterdir() if page in path.read_bytes())


def flip(kvist: Kvist, page: bytes) -> None:
    path = segment_of(kvist, page)
    data = bytearray(path.read_bytes())
    data[data.index(page) + 5] ^= 1
    path.write_bytes(data)


# -- init, stats -------------------------------------------------------------------------------------------------


def test_init(tmp_path: Path) -> None:
    store = str(tmp_path / "new")
    made = run(["--store", store, "init", "--page-digest", "sha256", "--json"], {})
    assert made.code == 0, made.err
    assert made.json["page_digest"] == "sha256" and made.json["store"] == Path(store).as_uri()
    again = run(["init", "--store", store, "--json"], {})
    assert (again.code, again.error["kind"]) == (5, "already_exists")
    assert run(["init", "--store", str(tmp_path / "q"), "-q"], {}).out.strip().isalnum()
    assert run(["init", "--store", str(tmp_path / "h")], {}).out.startswith("made repository ")
    assert run(["init", "--store", str(tmp_path / "x"), "--page-digest", "md5"], {}).code == 2


def test_the_default_store_is_in_the_users_data(tmp_path: Path) -> None:
    made = run(["init", "--json"], {"XDG_DATA_HOME": str(tmp_path), "KVIST_STORE": None})
    assert made.json["store"] == (tmp_path / "kvist" / "store").as_uri()


def test_stats(filled: Kvist) -> None:
    found = filled.ok("stats", "--json").json
    assert found["branches"] == 2 and found["snapshots"] == 2 and found["tokens"] == 20
    assert found["page_bytes"] == 10 * LAYOUT.page_bytes and found["dedup"] == 1.0
    assert found["store"] == filled.url
    assert filled.ok("stats", "-q").lines == [found["id"]]
    out = filled.ok("stats").out
    assert f"store                  {filled.url}" in out and "dedup" in out and "1.00x" in out


# -- fsck --------------------------------------------------------------------------------------------------------


def test_fsck_of_what_is_whole(filled: Kvist) -> None:
    assert filled.ok("fsck").out == "clean: 2 snapshots checked, 10 page halves read\n"
    assert filled.ok("fsck", "--quick").out == "clean: 2 snapshots checked, 10 page halves looked up\n"
    assert filled.ok("fsck", "--json").json == {
        "clean": True,
        "findings": [],
        "snapshots": 2,
        "pages": 10,
        "read_pages": True,
    }
    assert filled.ok("fsck", "-q").out == ""


def test_fsck_names_a_flipped_byte(filled: Kvist) -> None:
    with filled.opened() as repo:
        manifest = repo.manifest(repo.snapshot("a").manifests[0])
    page = manifest.pages[0].v
    flip(filled, half(1))
    assert filled.ok("fsck", "--quick", "--json").json["clean"]  # nobody has read it yet
    ran = filled("fsck", "--json")
    assert (ran.code, ran.err) == (3, "")
    (finding,) = ran.json["findings"]
    assert (finding["code"], finding["subject"]) == ("damaged_page", page)
    assert finding["affects"] == filled.ok("log", "a", "-q").lines
    assert filled("fsck", "--quick", "-q").lines == [page]  # now it is marked
    human = filled("fsck")
    assert human.code == 3 and page in human.out and human.lines[-1].startswith("1 finding: ")
    with filled.opened() as repo:
        put_manifest(repo, 0, 2)  # the next put heals it
    filled.ok("fsck")


def test_fsck_finds_a_lost_segment_and_a_dangling_branch(filled: Kvist) -> None:
    segment_of(filled, half(0)).unlink()
    (cid,) = filled.ok("log", "b", "-q").lines
    (filled.root / "snapshots" / cid.removeprefix("sha256:")).unlink()
    findings = filled_findings(filled)
    assert [code for code, _ in findings] == ["dangling_ref"] + ["missing_page"] * 4
    assert findings[0][1] == "kvist branch --delete b"
    filled.ok(*findings[0][1].split()[1:])
    assert [code for code, _ in filled_findings(filled)] == ["missing_page"] * 4
    ran = filled("gc", "--yes", "--min-age", "0s", "--json")
    assert (ran.code, ran.error["kind"], ran.error["hint"]) == (20, "integrity", "kvist fsck")


def filled_findings(kvist: Kvist) -> list[tuple[str, str]]:
    ran = kvist("fsck", "--json")
    assert ran.code == 3
    return [(finding["code"], finding["mend"]) for finding in ran.json["findings"]]


# -- gc ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def garbage(filled: Kvist) -> Kvist:
    """Nothing reaches what branch ``b`` held."""
    filled.ok("branch", "--delete", "b")
    return filled


def test_gc_plans_then_deletes(garbage: Kvist) -> None:
    plan = garbage.ok("gc", "--dry-run", "--min-age", "0s", "--json").json
    assert not plan["applied"] and len(plan["snapshots"]) == len(plan["manifests"]) == len(plan["segments"]) == 1
    human = garbage.ok("gc", "--dry-run", "--min-age", "0s").lines
    assert human[0].startswith("delete snapshot ") and human[-1].startswith("delete 1 snapshots, 1 manifests")
    assert garbage.ok("stats", "--json").json["unreachable_snapshots"] == 1
    done = garbage.ok("gc", "--yes", "--min-age", "0s", "--json").json
    assert done == plan | {"applied": True}
    assert garbage.ok("stats", "--json").json["unreachable_snapshots"] == 0
    assert garbage.ok("gc", "--yes", "--min-age", "0s").out == "nothing to delete\n"
    garbage.ok("fsck")


def test_gc_quiet_prints_what_it_deletes(garbage: Kvist) -> None:
    lines = garbage.ok("gc", "--yes", "--min-age", "0s", "-q").lines
    assert [line.partition(":")[0] for line in lines[:2]] == ["sha256", "sha256"]
    assert lines[2].startswith(SEGMENTS)


def test_gc_keeps_the_young(garbage: Kvist) -> None:
    for age in ([], ["--min-age", "1d"], ["--min-age", "30m"], ["--min-age", "1.5h"]):
        assert garbage.ok("gc", "--yes", *age).out == "nothing to delete\n"


@pytest.mark.parametrize("age", ["1", "h", "-1s", "1w", "1h30m", "", "1e3s", "nan"])
def test_gc_refuses_what_is_no_duration(garbage: Kvist, age: str) -> None:
    ran = garbage("gc", "--yes", f"--min-age={age}")
    assert ran.code == 2 and "1h, 30m or 0s" in ran.err


@pytest.mark.parametrize("words", [[], ["--json"], ["-q"]])
def test_gc_does_not_ask_a_program(garbage: Kvist, words: list[str]) -> None:
    ran = garbage("gc", "--min-age", "0s", *words, stdin="y\n")
    assert (ran.code, ran.out) == (2, "") and "--yes" in ran.err
    assert garbage.ok("stats", "--json").json["unreachable_snapshots"] == 1


@pytest.mark.parametrize(("answer", "code", "left"), [("y\n", 0, 0), ("n\n", 1, 1), ("", 130, 1)])
def test_gc_asks_people(garbage: Kvist, monkeypatch: pytest.MonkeyPatch, answer: str, code: int, left: int) -> None:
    monkeypatch.setattr("kvist.cli.output.Output.can_ask", True)
    ran = garbage("gc", "--min-age", "0s", stdin=answer)
    assert ran.code == code
    assert "delete 1 snapshots" in ran.err and "Delete? [y/N]:" in ran.err
    assert ran.out.startswith("done: delete 1 snapshots") if answer == "y\n" else ran.out == ""
    if answer == "n\n":
        assert ran.err.endswith("error: nothing was deleted\n")
    assert garbage.ok("stats", "--json").json["unreachable_snapshots"] == left


def test_gc_asks_nobody_when_there_is_nothing_to_delete(filled: Kvist, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvist.cli.output.Output.can_ask", True)
    ran = filled("gc", "--min-age", "0s")
    assert (ran.code, ran.out, ran.err) == (0, "nothing to delete\n", "")


def test_gc_meets_a_lock(garbage: Kvist) -> None:
    lock = garbage.root / LOCK
    lock.parent.mkdir()
    lock.write_text('{"host":"elsewhere","objects":[],"pages":[],"pid":1,"repacked":[],"segments":[],"started":0.0}')
    ran = garbage("gc", "--yes", "--json")
    assert (ran.code, ran.error["kind"]) == (11, "locked")
    assert ran.error["hint"].endswith("kvist gc --break-lock")
    garbage.ok("gc", "--yes", "--break-lock")
    assert not lock.exists()


def test_gc_breaks_an_unreadable_lock(garbage: Kvist) -> None:
    lock = garbage.root / LOCK
    lock.parent.mkdir()
    lock.write_text("{")
    assert filled_findings(garbage) == [("damaged_lock", "kvist gc --break-lock")]
    ran = garbage("gc", "--yes", "--min-age", "0s", "--json")
    assert (ran.code, ran.error["kind"], ran.error["hint"]) == (11, "locked", "kvist gc --break-lock")
    assert garbage.ok("gc", "--yes", "--min-age", "0s", "--break-lock", "--json").json["applied"]
    assert not lock.exists()
    garbage.ok("fsck")


def test_a_long_plan_is_cut_for_people(kvist: Kvist, graph: Graph) -> None:
    for number in range(25):
        graph.add(f"s{number}")
    lines = kvist.ok("gc", "--dry-run", "--min-age", "0s").lines
    assert sum(line.startswith("delete snapshot ") for line in lines) == 20
    assert "delete snapshot: 5 more, which --json lists" in lines
    assert len(kvist.ok("gc", "--dry-run", "--min-age", "0s", "--json").json["snapshots"]) == 25
