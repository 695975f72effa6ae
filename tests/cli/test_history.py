"""`kvist log`, `show` and `diff`."""

from __future__ import annotations

import dataclasses
import re
import textwrap
import time

import pytest

from kvist.ids import short
from kvist.layout import Layout
from kvist.repo import LogicalSeq, Manifest, PageEntry

from .conftest import LAYOUT, MINUTE_NS, NOW_NS, Graph, Kvist, put_manifest


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: NOW_NS + 20 * MINUTE_NS)


def lettered(text: str, graph: Graph) -> str:
    for letter, cid in graph.cids.items():
        text = text.replace(short(cid), letter * 12)
    return text


def golden(text: str) -> str:
    return textwrap.dedent(text).lstrip("\n")


# -- log ---------------------------------------------------------------------------------------------------------


def test_log_of_a_line(kvist: Kvist, graph: Graph) -> None:
    graph.add("A", message="first\nnever shown")
    graph.add("B", "A")
    graph.add("C", "B", branch="main")
    kvist.ok("tag", "v1", graph.cids["B"])
    expected = """
        CCCCCCCCCCCC  18m  7 tok  [main]  C
        BBBBBBBBBBBB  19m  7 tok  [tag: v1]  B
        AAAAAAAAAAAA  20m  7 tok  A: first
    """
    assert lettered(kvist.ok("log").out, graph) == golden(expected)
    assert lettered(kvist.ok("log", "v1").out, graph) == "".join(golden(expected).splitlines(keepends=True)[1:])
    assert lettered(kvist.ok("log", "--graph", "-n", "2").out, graph) == golden("""
        * CCCCCCCCCCCC  18m  7 tok  [main]  C
        * BBBBBBBBBBBB  19m  7 tok  [tag: v1]  B
    """)


def test_log_graph_of_a_fork_of_three(kvist: Kvist, graph: Graph) -> None:
    graph.add("A")
    for letter in "BCD":
        graph.add(letter, "A", branch=f"try/{letter}")
    assert lettered(kvist.ok("log", "--graph").out, graph) == golden("""
        * DDDDDDDDDDDD  17m  7 tok  [try/D]  D
        | * CCCCCCCCCCCC  18m  7 tok  [try/C]  C
        |/
        | * BBBBBBBBBBBB  19m  7 tok  [try/B]  B
        |/
        * AAAAAAAAAAAA  20m  7 tok  A
    """)


def test_log_graph_of_a_fork_of_twelve(kvist: Kvist, graph: Graph) -> None:
    cid = graph.add("A", branch="main")
    kvist.ok("fork", "main", "-n", "12", "--name", "f")
    lines = kvist.ok("log", "--graph").lines
    assert len(lines) == 12 + 11 + 1
    assert lines[0].startswith("* ") and lines[-1].startswith(f"* {short(cid)}")
    assert [line[:4] for line in lines[1:-1]] == ["| * ", "|/"] * 11
    assert {found[1] for line in lines if (found := re.search(r"\[(f/.*)\]", line))} == {f"f/{i}" for i in range(12)}


def test_log_graph_of_a_merge(kvist: Kvist, graph: Graph) -> None:
    graph.add("A")
    graph.add("B", "A")
    graph.add("C", "A")
    graph.add("M", "C B", branch="main")
    assert lettered(kvist.ok("log", "--graph").out, graph) == golden(r"""
        * MMMMMMMMMMMM  17m  7 tok  [main]  M
        |\
        * | CCCCCCCCCCCC  18m  7 tok  C
        | * BBBBBBBBBBBB  19m  7 tok  B
        |/
        * AAAAAAAAAAAA  20m  7 tok  A
    """)


def test_log_json_and_quiet(kvist: Kvist, graph: Graph) -> None:
    a = graph.add("A", message="hello")
    b = graph.add("B", "A", branch="main")
    assert kvist.ok("log", "-q").lines == [b, a]
    listed = kvist.ok("log", "--graph", "--json").json["snapshots"]
    assert [one["cid"] for one in listed] == [b, a]
    assert listed[0]["parents"] == [a]
    assert listed[0]["refs"] == [{"kind": "branch", "name": "main"}]
    assert listed[0]["graph"] == {"lane": 0, "before": [], "after": [a]}
    assert listed[1]["message"] == "hello" and listed[1]["created"] == "2023-11-14T22:13:20+00:00"
    assert "graph" not in kvist.ok("--json", "log").json["snapshots"][0]


def test_log_of_nothing(kvist: Kvist) -> None:
    ran = kvist.ok("log")
    assert (ran.out, ran.err) == ("", "no snapshots yet\n")
    assert kvist.ok("log", "--json").json == {"snapshots": []}
    assert kvist.ok("log", "--graph", "--quiet").out == ""


def test_what_a_snapshot_says_cannot_drive_the_terminal(kvist: Kvist, graph: Graph) -> None:
    graph.add("A", branch="main", message="\x1b[31mred\x07 \u202eback")
    for words in (["log"], ["show", "main"]):
        out = kvist.ok(*words).out
        assert "\x1b" not in out and "\x07" not in out and "\u202e" not in out
        assert "\\x1b[31mred\\x07 \\u202eback" in out


def test_log_of_an_unknown_rev(kvist: Kvist) -> None:
    ran = kvist("log", "nowhere")
    assert (ran.code, ran.out) == (4, "")
    assert ran.err == "error: no snapshot, branch or tag is called 'nowhere'\nhint: kvist log\n"
    assert kvist("log", "nowhere", "--json").error == {
        "kind": "not_found",
        "message": "no snapshot, branch or tag is called 'nowhere'",
        "hint": "kvist log",
        "exit_code": 4,
    }


def test_an_ambiguous_rev(kvist: Kvist, graph: Graph) -> None:
    a, b = graph.add("A", branch="x"), graph.add("B")
    kvist.ok("tag", "x", b)
    ran = kvist("show", "x", "--json")
    assert ran.code == 2 and ran.error["kind"] == "invalid_input"
    assert a in ran.error["message"] and b in ran.error["message"]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "main~1", "a b", ".hidden", ""])
def test_a_rev_that_cannot_be_a_name(kvist: Kvist, name: str) -> None:
    for words in (["show", name], ["log", name], ["diff", name, name], ["fork", name, "-n", "1"], ["tag", name]):
        ran = kvist(*words, "--json")
        assert (ran.code, ran.error["kind"]) == (2, "invalid_name"), words


# -- show --------------------------------------------------------------------------------------------------------


def test_show(kvist: Kvist, graph: Graph) -> None:
    a = graph.add("A")
    b = graph.add("B", "A", branch="main", message="two\nlines")
    kvist.ok("tag", "v1", "main")
    out = kvist.ok("show", short(b)).out
    for line in (
        f"snapshot        {b}",
        "branch          main",
        "tag             v1",
        f"parent          {a}",
        "created         2023-11-14T22:14:20+00:00 (19m ago)",
        "tokens          7",
        "bytes of pages  512",
        "    two",
        "    lines",
        "model        org/tiny, revision r1",
        "layout       2 layers x 1 KV heads x 8, bf16, 4 tokens a page, LNHD, rank 0 of 1",
        "pages        2 of 2 x 128 bytes",
        "sequence  tokens  pages  last page",
        "s              7      2  3 of 4",
    ):
        assert line in out.splitlines(), out
    assert kvist.ok("show", "main", "-q").lines == [b]


def test_show_json(kvist: Kvist, graph: Graph) -> None:
    cid = graph.add("A", branch="main")
    shown = kvist.ok("show", "main", "--json").json
    assert shown["cid"] == cid and shown["page_bytes"] == 512 and shown["parents"] == []
    (manifest,) = shown["manifests"]
    assert manifest["cid"] == graph.manifest.cid
    assert manifest["layout"]["fingerprint"] == LAYOUT.fingerprint
    assert manifest["layout"]["page_bytes"] == LAYOUT.page_bytes
    assert manifest["sequences"] == [{"id": "s", "tokens": 7, "token_ids": 7, "first_page": 0, "pages": 2, "fill": 3}]


def test_show_without_pages(kvist: Kvist) -> None:
    empty = Manifest(
        Layout(page_size_tokens=4, n_layers=0, n_heads=0, head_dim=0, dtype="f32"), (), (LogicalSeq("s", ()),)
    )
    with kvist.opened() as repo:
        repo.commit([empty], branch="main")
    out = kvist.ok("show", "main").out
    assert "model        not named, revision not named" in out
    assert "s              0      0  none" in out


def put_parts(kvist: Kvist, pages: int, branch: str) -> None:
    """A snapshot of one rank with two groups; the second group has lost the first page of its sequence."""
    full = dataclasses.replace(LAYOUT, n_groups=2)
    slides = dataclasses.replace(full, group=1, attention="sliding:6", n_layers=1, memory_order="vllm-nhd")
    manifests = []
    with kvist.opened() as repo:
        for layout in (full, slides):
            held = pages - layout.group
            data = [n.to_bytes(4, "little") * (layout.page_bytes // 4) for n in range(2 * held)]
            digests = repo.put_pages(data).digests
            entries = tuple(PageEntry(ix, digests[2 * ix], digests[2 * ix + 1]) for ix in range(held))
            seqs = (LogicalSeq("s", tuple(range(held)), 3, first_page=layout.group),)
            manifests.append(Manifest(layout, entries, seqs))
        repo.commit(manifests, branch=branch)


def test_show_a_snapshot_of_two_groups(kvist: Kvist) -> None:
    put_parts(kvist, 3, "main")
    lines = kvist.ok("show", "main").lines
    for line in (
        "tokens          11",
        f"bytes of pages  {6 * 128 + 4 * 64:,}",
        "layout       2 layers x 1 KV heads x 8, bf16, 4 tokens a page, LNHD, rank 0 of 1, group 0 of 2",
        "layout       1 layers x 1 KV heads x 8, bf16, 4 tokens a page, vllm-nhd, rank 0 of 1, group 1 of 2, "
        "sliding:6 attention",
        "pages        3 of 2 x 128 bytes",
        "pages        2 of 2 x 64 bytes",
        "sequence  tokens  pages  last page",
        "s             11      3  3 of 4",
        "sequence  tokens  first page  pages  last page",
        "s             11           1      2  3 of 4",
    ):
        assert line in lines, lines
    full, slides = kvist.ok("show", "main", "--json").json["manifests"]
    assert (full["pages"], slides["pages"]) == (3, 2)
    assert (slides["layout"]["attention"], slides["layout"]["group"]) == ("sliding:6", 1)
    assert slides["sequences"][0]["first_page"] == 1
    assert [one["tokens"] for one in kvist.ok("log", "--json").json["snapshots"]] == [11]
    assert kvist.ok("stats", "--json").json["page_bytes"] == 6 * 128 + 4 * 64
    assert kvist.ok("fsck", "--json").json["pages"] == 10


# -- diff --------------------------------------------------------------------------------------------------------


def test_diff(kvist: Kvist) -> None:
    with kvist.opened() as repo:
        a = repo.commit([put_manifest(repo, 0, 3)], branch="a").cid
        b = repo.commit([put_manifest(repo, 0, 4)], branch="b").cid
    found = kvist.ok("diff", "a", "b", "--json").json
    assert (found["a"], found["b"], found["same_layout"]) == (a, b, True)
    assert (found["pages_shared"], found["pages_only_a"], found["pages_only_b"]) == (6, 0, 2)
    assert (found["bytes_shared"], found["tokens_shared"]) == (6 * LAYOUT.page_bytes, 12)
    assert kvist.ok("diff", "a", "b", "-q").lines == [a, b]
    lines = kvist.ok("diff", "a", "b").lines
    assert "layout  same layout" in lines
    assert [line.split() for line in lines if line.startswith(("page", "bytes", "s "))] == [
        ["page", "halves", "6", "0", "2"],
        ["bytes", "768", "0", "256"],
        ["s", "12", "12", "16"],
    ]


def test_diff_of_snapshots_of_two_groups(kvist: Kvist) -> None:
    put_parts(kvist, 3, "a")
    put_parts(kvist, 4, "b")
    lines = [line.split() for line in kvist.ok("diff", "a", "b").lines]
    for line in (
        ["page", "halves", "10", "0", "4"],
        ["rank", "0,", "group", "0", "6", "0", "2"],
        ["rank", "0,", "group", "1", "4", "0", "2"],
        ["s", "0", "11", "15"],
    ):
        assert line in lines, lines
    parts = kvist.ok("diff", "a", "b", "--json").json["parts"]
    assert [(part["group"], part["pages_only_b"]) for part in parts] == [(0, 2), (1, 2)]


def test_diff_of_different_page_sizes_counts_each_by_its_own(kvist: Kvist) -> None:
    with kvist.opened() as repo:
        for name, size in (("a", 4), ("b", 8)):
            layout = Layout(page_size_tokens=size, n_layers=1, n_heads=1, head_dim=1, dtype="bf16")
            digests = repo.put_pages([bytes(layout.page_bytes), b"\1" * layout.page_bytes]).digests
            repo.commit([Manifest(layout, (PageEntry(0, *digests),), (LogicalSeq("s", (0,)),))], branch=name)
    found = kvist.ok("diff", "a", "b", "--json").json
    assert not found["same_layout"]
    assert [(seq["tokens_a"], seq["tokens_b"]) for seq in found["sequences"]] == [(4, 8)]
    assert "different layouts" in kvist.ok("diff", "a", "b").out


def test_a_snapshot_that_is_damaged(kvist: Kvist, graph: Graph) -> None:
    cid = graph.add("A", branch="main")
    path = kvist.root / "snapshots" / cid.removeprefix("sha256:")
    path.write_bytes(path.read_bytes().replace(b'"A"', b'"B"'))
    ran = kvist("show", "main", "--json")
    assert (ran.code, ran.error["kind"]) == (20, "damaged_object")
