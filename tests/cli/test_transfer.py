"""`kvist push`, `pull` and `clone`."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvist.cli.output import Output
from kvist.repo import RefKind, Repository, fsck, transfer

from .conftest import LAYOUT, Kvist, put_manifest, run


@pytest.fixture
def filled(kvist: Kvist) -> Kvist:
    """Branches ``a`` and ``b``, of two and three pages, and a tag ``v1`` of ``a``."""
    with kvist.opened() as repo:
        repo.commit([put_manifest(repo, 0, 2)], branch="a")
        repo.commit([put_manifest(repo, 10, 3)], branch="b")
        repo.tag("v1", "a")
    return kvist


@pytest.fixture
def other(tmp_path: Path) -> Kvist:
    """Another place; nothing is there."""
    return Kvist(tmp_path / "other")


def names(kvist: Kvist) -> dict[str, str | None]:
    with kvist.opened() as repo:
        assert fsck.check(repo).is_clean
        return {f"{ref.kind.noun} {ref.name}": ref.cid for ref in repo.refs.all()}


def test_push_makes_the_repository_and_sends_what_is_missing(filled: Kvist, other: Kvist) -> None:
    planned = filled.ok("push", other.url, "--all", "--dry-run", "--json").json
    assert not other.root.exists(), "a dry run makes nothing"
    assert planned["made"] and not planned["applied"] and planned["target"] == other.url
    done = filled.ok("push", other.url, "--all", "--json").json
    assert done["applied"] and done["moved_pages"] == planned["pages"] == 10
    assert done["moved_page_bytes"] == done["page_bytes"] == 10 * LAYOUT.page_bytes
    assert done["source"] == filled.url and done["refs"] == planned["refs"]
    assert [(ref["kind"], ref["name"], ref["act"], ref["before"]) for ref in done["refs"]] == [
        ("branch", "a", "create", None),
        ("branch", "b", "create", None),
        ("tag", "v1", "create", None),
    ]
    assert names(other) == names(filled)
    again = filled.ok("push", other.url, "--all", "--json").json
    assert again["pages"] == again["moved_pages"] == 0 and not again["made"]
    assert {ref["act"] for ref in again["refs"]} == {"keep"}
    assert filled.ok("push", other.url, "a").out == "nothing to move: it is all there\n"


def test_push_tells_people(filled: Kvist, other: Kvist) -> None:
    would = filled.ok("push", other.url, "a", "b:copy", "--dry-run").lines
    assert would[0] == f"would make a repository at {other.url}"
    cid = filled.ok("log", "b", "-q").out.strip()
    assert would[1].split()[:3] == ["create", "branch", "a"]
    assert would[2].split() == ["create", "branch", "copy", cid[7:19]]
    assert would[3] == f"would move 2 snapshots, 2 manifests, 10 page halves ({10 * LAYOUT.page_bytes:,} bytes)"
    did = filled.ok("push", other.url, "a", "b:copy").lines
    assert did[0] == f"made repository at {other.url}" and did[1:3] == would[1:3]
    assert did[3] == would[3].removeprefix("would ").replace("move", "moved", 1)
    assert filled.ok("push", other.url, "b:copy", "-q").lines == [cid]


def test_push_quiet_prints_cids(filled: Kvist, other: Kvist) -> None:
    assert filled.ok("push", other.url, "b", "-q").lines == filled.ok("log", "b", "-q").lines


def test_pull_goes_the_other_way(filled: Kvist, other: Kvist) -> None:
    Repository.init(other.url).close()
    assert other.ok("pull", filled.url, "b", "--dry-run", "--json").json["refs"][0]["act"] == "create"
    assert names(other) == {}
    other.ok("pull", filled.url, "b")
    assert names(other) == {"branch b": names(filled)["branch b"]}
    with filled.opened() as repo:
        repo.commit([put_manifest(repo, 20, 1)], branch="b")
    done = other.ok("pull", filled.url, "--all", "--json").json
    assert done["moved_pages"] == 2 + 4 and names(other) == names(filled)


def test_clone(filled: Kvist, tmp_path: Path) -> None:
    where = (tmp_path / "copy").as_uri()
    planned = run(["clone", filled.url, "--store", where, "--dry-run", "--json"], {}).json
    assert planned["pages"] == 10 and not (tmp_path / "copy").exists()
    made = run(["clone", filled.url, "--store", where], {})
    assert made.code == 0, made.err
    with Repository.open(where) as copy, filled.opened() as source:
        assert {ref.name for ref in copy.refs.all()} == {"a", "b", "v1"}
        assert fsck.check(copy).is_clean and copy.id != source.id
    for more in ([], ["--dry-run"]):
        again = run(["clone", filled.url, "--store", where, "--json", *more], {})
        assert (again.code, again.error["kind"]) == (5, "already_exists")
        assert f"pull {filled.url} --all" in again.error["hint"]


def test_a_salted_repository_is_cloned_with_its_salt_and_pushed_nowhere_else(kvist: Kvist, tmp_path: Path) -> None:
    source, salt = (tmp_path / "salted").as_uri(), "12" * 32
    with Repository.init(source, salt=salt) as repo:
        repo.commit([put_manifest(repo, 0, 2)], branch="a")
    ran = run(["--store", source, "push", kvist.url, "a", "--json"], {})
    assert (ran.code, ran.error["kind"]) == (12, "page_name_mismatch")
    assert "blake3+" in ran.error["message"] and salt not in ran.err
    where = (tmp_path / "copy").as_uri()
    assert run(["clone", source, "--store", where], {}).code == 0
    with Repository.open(where) as copy:
        assert copy.config.salt == salt and fsck.check(copy).is_clean


def test_the_remote_may_come_from_the_environment(filled: Kvist, other: Kvist) -> None:
    there: dict[str, str | None] = {"KVIST_REMOTE": other.url}
    assert filled("push", "a", env=there).code == 0
    assert filled("push", "--all", env=there).code == 0
    assert filled("pull", "--all", env=there).out == "nothing to move: it is all there\n"
    assert names(other) == names(filled)
    for words in (["push", "a"], ["push", "--all"], ["pull", "store"]):
        ran = filled(*words, env={"KVIST_REMOTE": None})
        assert ran.code == 2 and "KVIST_REMOTE" in ran.err


@pytest.mark.parametrize("words", [[], ["a", "--all"]])
def test_what_to_move_must_be_said(filled: Kvist, other: Kvist, words: list[str]) -> None:
    for command in ("push", "pull"):
        ran = filled(command, other.url, *words)
        assert ran.code == 2 and "or --all" in ran.err
    assert not other.root.exists()


def test_a_push_that_cannot_be_planned_makes_nothing(filled: Kvist, other: Kvist) -> None:
    ran = filled("push", other.url, "none", "--json")
    assert (ran.code, ran.error["kind"]) == (4, "not_found")
    cid = filled.ok("log", "a", "-q").out.strip()
    ran = filled("push", other.url, cid, "--json")
    assert (ran.code, ran.error["kind"]) == (2, "invalid_input") and ran.error["hint"].endswith(f"{cid[7:19]}:NAME")
    assert not other.root.exists()
    filled.ok("push", other.url, f"{cid[7:19]}:named")
    assert names(other) == {"branch named": cid}


def test_a_pull_from_nowhere(kvist: Kvist, other: Kvist) -> None:
    ran = kvist("pull", other.url, "--all", "--json")
    assert (ran.code, ran.error["kind"]) == (10, "repository_not_found")


def test_paths_are_told_from_refs(filled: Kvist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    filled.ok("push", "./here", "a")
    filled.ok("push", f"{tmp_path}/here", "b")
    assert Repository.open("here").refs.read(RefKind.BRANCH, "b") is not None
    assert filled("push", "here", "a").code == 2, "that is a branch's name as well"


def test_urls_are_told_from_refs(filled: Kvist, other: Kvist) -> None:
    """Any scheme is one, known or not; what a branch may be called is a branch."""
    for url in ("abfs://container/prefix", "ftp://host/path"):
        ran = filled("push", url, "a", "--json")
        assert (ran.code, ran.error["kind"]) == (2, "invalid_input") and "unknown scheme" in ran.error["message"]
    filled.ok("branch", "s3", "a")
    assert filled("push", "s3:copy", env={"KVIST_REMOTE": other.url}).code == 0
    assert names(other).keys() == {"branch copy"}


def test_force(filled: Kvist, other: Kvist) -> None:
    filled.ok("push", other.url, "a")
    with other.opened() as repo:
        repo.commit([put_manifest(repo, 30, 1)], branch="a")
    with filled.opened() as repo:
        repo.commit([put_manifest(repo, 40, 1)], branch="a")
    ran = filled("push", other.url, "a", "--json")
    assert (ran.code, ran.error["kind"]) == (11, "conflict") and "--force" in ran.error["hint"]
    planned = filled.ok("push", other.url, "a", "--force", "--dry-run").lines[0]
    assert planned.startswith("replace  branch a")
    done = filled.ok("push", other.url, "a", "--force", "--json").json
    assert done["refs"][0]["act"] == "replace" and done["refs"][0]["before"] != done["refs"][0]["cid"]
    assert names(other)["branch a"] == names(filled)["branch a"]


def test_heal(filled: Kvist, other: Kvist) -> None:
    filled.ok("push", other.url, "--all")
    for path in (other.root / "manifests").iterdir():
        path.write_bytes(b"{}")
    assert other("fsck").code == 3
    assert filled.ok("push", other.url, "--all").out == "nothing to move: it is all there\n"
    assert filled.ok("push", other.url, "--all", "--heal", "--json").json["manifests"]
    other.ok("fsck")


def test_heal_after_a_fsck(filled: Kvist, other: Kvist) -> None:
    """It only reads: nothing is known of what it found."""
    filled.ok("push", other.url, "--all")
    (segment,) = (other.root / "segments").iterdir()
    segment.write_bytes(b"?" + segment.read_bytes()[1:])
    assert other("fsck").code == 3
    assert filled.ok("push", other.url, "--all").out == "nothing to move: it is all there\n"
    assert filled.ok("push", other.url, "--all", "--heal", "--json").json["pages"] == 1
    other.ok("fsck")


def test_many_refs_are_cut_for_people(filled: Kvist, other: Kvist) -> None:
    filled.ok("fork", "a", "-n", "60", "--name", "f")
    lines = filled.ok("push", other.url, "--all", "--dry-run").lines
    assert len(lines) == 43 and "23 refs more, which --json lists" in lines
    assert len(filled.ok("push", other.url, "--all", "--json").json["refs"]) == 63


def test_a_bar_of_bytes(filled: Kvist, other: Kvist, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    real = transfer.apply

    def spy(*args: object, progress: object = None, **more: object) -> transfer.Transferred:
        return real(*args, progress=lambda done, of: seen.append((done, of)), **more)  # type: ignore[arg-type]

    monkeypatch.setattr(transfer, "apply", spy)
    filled.ok("push", other.url, "--all")
    assert seen == [(0, 10 * LAYOUT.page_bytes), (10 * LAYOUT.page_bytes, 10 * LAYOUT.page_bytes)]


def test_the_bar_counts_bytes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Output().progress("pages", is_bytes=True) as bar:
        assert bar is not None
        bar(1_000_000, 3_000_000)
    assert "1.0/3.0 MB" in capsys.readouterr().err
