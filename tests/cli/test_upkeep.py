"""`kvist init`, `stats`, `fsck`, `repair`, `prune` and `gc`."""

from __future__ import annotations

import shutil
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
    size = 10 * LAYOUT.page_bytes
    read = f"clean: 2 snapshots with 10 page halves checked, {size:,} bytes of pages read ("
    assert filled.ok("fsck").out.startswith(read)
    assert filled.ok("fsck", "--quick").out == "clean: 2 snapshots with 10 page halves checked, pages looked up only\n"
    found = filled.ok("fsck", "--json").json
    assert found.pop("seconds") > 0
    assert found == {
        "clean": True,
        "findings": [],
        "snapshots": 2,
        "pages": 10,
        "read_pages": True,
        "complete": True,
        "bytes_read": size,
        "bytes_done": size,
        "bytes_all": size,
    }
    assert filled.ok("fsck", "-q").out == ""


def test_fsck_that_is_stopped_goes_on(filled: Kvist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("kvist.store.local.LocalStore.window", 1)
    monkeypatch.setattr("kvist.store.local.LocalStore.parallel", 1)
    first = filled.ok("fsck", "--max-duration", "0s", "--json").json
    assert first["clean"] and not first["complete"] and 0 < first["bytes_done"] < first["bytes_all"]
    (noted,) = (tmp_path / "kvist" / "fsck").iterdir()
    assert filled.ok("fsck", "--max-duration", "0s").lines[-1].endswith("run it again to go on")
    last = filled.ok("fsck", "--max-duration", "1h", "--json").json
    assert last["complete"] and last["bytes_read"] < last["bytes_all"] == last["bytes_done"]
    assert not noted.exists()
    ran = filled("fsck", "--quick", "--max-duration", "1h")
    assert ran.code == 2 and "--quick" in ran.err
    assert filled("fsck", "--max-duration", "ten minutes").code == 2


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
    assert filled.ok("fsck", "--quick", "-q").lines == [], "a check writes nothing"
    human = filled("fsck")
    assert human.code == 3 and page in human.out and human.lines[-1].startswith("1 finding: ")
    assert filled("repair", "--yes", "--json").json["done"][0]["act"] == "mark_copy"
    assert filled("fsck", "--quick", "-q").lines == [page]
    with filled.opened() as repo:
        put_manifest(repo, 0, 2)  # the next put heals it
    filled.ok("fsck")


def test_gc_refuses_what_the_last_fsck_found_and_still_is(
    filled: Kvist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flip(filled, half(1))
    filled.ok("gc", "--yes")  # nobody has read it yet
    assert filled("fsck").code == 3
    ran = filled("gc", "--yes", "--json")
    assert (ran.code, ran.error["kind"]) == (20, "integrity") and "damaged_page" in ran.error["message"]
    with filled.opened() as repo:
        put_manifest(repo, 0, 2)
    filled.ok("gc", "--yes")


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


# -- repair ------------------------------------------------------------------------------------------------------


def test_repair_plans_then_mends(filled: Kvist, tmp_path: Path) -> None:
    copy = Kvist(tmp_path / "copy")
    shutil.copytree(filled.root, copy.root)
    flip(filled, half(1))
    segment_of(filled, half(20)).unlink()
    plan = filled("repair", "--dry-run", "--from", copy.url, "--json")
    assert plan.code == 3 and not plan.json["applied"] and plan.json["left"] == []
    assert [step["act"] for step in plan.json["steps"]] == ["mark_copy"] + ["fetch_page"] * 7
    human = filled("repair", "--dry-run", "--from", copy.url)
    assert human.lines[0].startswith("mark copy blake3:") and " in segments/" in human.lines[0]
    alone = filled("repair", "--dry-run")
    assert "7 of 7 findings stay:" in alone.lines
    assert filled("repair", "--dry-run", "-q").lines == [plan.json["steps"][0]["subject"]]
    ran = filled("repair", "--yes", "--from", copy.url)
    assert (ran.code, ran.out) == (0, "8 steps done\n")
    assert filled.ok("repair", "--yes").out == "nothing to repair\n"
    filled.ok("fsck")


def test_repair_asks_people_and_no_program(filled: Kvist, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(filled, half(1))
    ran = filled("repair")
    assert ran.code == 2 and "--yes" in ran.err
    monkeypatch.setattr("kvist.cli.output.Output.can_ask", True)
    ran = filled("repair", stdin="n\n")
    assert ran.code == 1 and ran.err.endswith("error: nothing was changed\n")
    ran = filled("repair", stdin="y\n")
    assert ran.code == 3 and ran.lines[0] == "1 steps done" and "damaged_page" in ran.out


def test_repair_takes_a_branch_back_when_told_to(filled: Kvist) -> None:
    (cid,) = filled.ok("log", "a", "-q").lines
    with filled.opened() as repo:
        made = repo.commit([put_manifest(repo, 20, 1)], branch="a")
    (filled.root / "manifests" / made.manifests[0].removeprefix("sha256:")).unlink()
    assert filled("repair", "--yes").code == 3
    ran = filled("repair", "--dry-run", "--rewind")
    assert ran.lines[0].startswith(f"rewind branch a to {cid.removeprefix('sha256:')[:12]}: ")
    filled.ok("repair", "--yes", "--rewind")
    assert filled.ok("log", "a", "-q").lines == [cid]
    filled.ok("fsck")


def test_repair_lists_what_an_unreadable_branch_may_have_named(filled: Kvist) -> None:
    with filled.opened() as repo:
        made = repo.commit([put_manifest(repo, 20, 1)], branch="new")
    (filled.root / "refs" / "branches" / "new.ref").write_bytes(b"damaged")
    ran = filled("repair", "--dry-run", "--rewind")
    assert ran.code == 3 and ran.lines[-1] == f"perhaps {made.cid}" and "--mend" in ran.lines[-2]
    filled.ok("branch", "--mend", "new", made.cid)
    filled.ok("fsck")


# -- prune -------------------------------------------------------------------------------------------------------


def test_prune_plans_then_marks(filled: Kvist) -> None:
    with filled.opened() as repo:
        for number in range(3):
            repo.commit([put_manifest(repo, 20 + number, 1)], branch="a")
    newest, *older = filled.ok("log", "a", "-q").lines
    plan = filled.ok("prune", "--keep-last", "1", "--dry-run", "--json").json
    assert plan["snapshots"] == older[::-1] and plan["branches"] == [] and not plan["applied"]
    human = filled.ok("prune", "--keep-last", "1", "--dry-run").lines
    assert human[0].startswith("prune ") and human[-1].startswith("delete 0 branches, prune 3 snapshots")
    done = filled.ok("prune", "--keep-last", "1", "--yes", "--json").json
    assert done == plan | {"applied": True}
    filled.ok("gc", "--yes", "--min-age", "0s")
    assert filled.ok("log", "a", "-q").lines == [newest, *older]
    assert [one["pruned"] for one in filled.ok("log", "a", "--json").json["snapshots"]] == [False, True, True, True]
    assert sum("(pruned)" in line for line in filled.ok("log", "a").lines) == 3
    shown = filled("show", older[0])
    assert shown.code == 0 and "was pruned" in shown.err
    assert filled("branch", "back", older[0], "--json").error["kind"] == "pruned_snapshot"
    assert filled.ok("stats", "--json").json["pruned_snapshots"] == 3
    filled.ok("fsck")


def test_prune_by_size_and_by_age_of_branches(filled: Kvist) -> None:
    plan = filled.ok("prune", "--max-bytes", "1KB", "--dry-run", "--json").json
    assert plan["fits"] is False and plan["snapshots"] == []
    plan = filled.ok("prune", "--delete-stale", "0s", "--branch", "b", "--dry-run", "--json").json
    assert [branch["name"] for branch in plan["branches"]] == ["b"]
    filled.ok("prune", "--delete-stale", "0s", "--branch", "b", "--yes")
    assert filled.ok("branch", "-q").lines == ["a"]


@pytest.mark.parametrize(
    "words", [[], ["--keep-last", "-1"], ["--keep-within", "1y"], ["--max-bytes", "lots"], ["--delete-stale", "30d"]]
)
def test_prune_without_sense(filled: Kvist, words: list[str]) -> None:
    assert filled("prune", "--yes", *words).code == 2


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
