"""`kvist convert`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace

import pytest

from kvist.pager.carry import CONVERTED

from .conftest import LAYOUT, Kvist, put_manifest, run

WIDE = replace(LAYOUT, page_size_tokens=8, memory_order="LHND")


@pytest.fixture
def story(kvist: Kvist) -> Kvist:
    """A branch ``story`` of three pages, eleven tokens, and ``other`` of an engine with wider pages."""
    with kvist.opened() as repo:
        repo.commit([put_manifest(repo, 0, 3, fill=3)], branch="story", name="tale")
        manifest = replace(put_manifest(repo, 0, 0), layout=WIDE)
        repo.commit([manifest], branch="other")
    return kvist


def test_plans_and_converts(story: Kvist) -> None:
    source = story.ok("log", "story", "-q").out.strip()
    planned = story.ok("convert", "story", "--like", "other", "--dry-run", "--json").json
    assert planned == {
        "source": source,
        "branch": f"converted/{source[7:19]}",
        "bit_exact": False,
        "differences": {
            "page_size_tokens": {"source": 4, "wanted": 8},
            "memory_order": {"source": "LNHD", "wanted": "LHND"},
        },
        "layout": dataclasses.asdict(WIDE),
        "sequences": [{"id": "s", "tokens": 11, "cached_tokens": 11, "pages": 2, "not_carried": []}],
        "source_pages": 3,
        "pages": 2,
        "left_out_pages": 0,
        "read_bytes": 6 * LAYOUT.page_bytes,
        "made_bytes": 4 * WIDE.page_bytes,
        "existing": None,
        "mends": False,
        "applied": False,
        "cid": None,
        "new_bytes": 0,
    }
    assert not story.ok("branch", "-q").out.count("converted"), "a dry run makes nothing"
    done = story.ok("convert", "story", "--like", "other", "--json").json
    assert done == planned | {"applied": True, "cid": done["cid"], "new_bytes": 4 * WIDE.page_bytes}
    shown = story.ok("show", planned["branch"], "--json").json
    assert shown["cid"] == done["cid"] and shown["parents"] == [source] and shown["name"] == "tale"
    assert "not bit-exact" in shown["message"]
    with story.opened() as repo:
        (manifest,) = repo.manifests(done["cid"])
        assert manifest.layout == WIDE and manifest.numerics == {CONVERTED: [LAYOUT.fingerprint]}
    assert story.ok("fsck").code == 0
    again = story.ok("convert", "story", "--like", "other", "--json").json
    assert (again["cid"], again["existing"], again["new_bytes"]) == (done["cid"], done["cid"], 0)


def test_tells_people(story: Kvist) -> None:
    would = story.ok("convert", "story", "--like", "other", "--as", "wide", "--dry-run").lines
    assert [line.split() for line in would[1:4]] == [
        ["page_size_tokens", "4", "8"],
        ["memory_order", "LNHD", "LHND"],
        ["pages", "3", "2"],
    ]
    assert would[4] == "sequence s: 11 tokens"
    assert would[5] == f"would read {6 * LAYOUT.page_bytes:,} bytes and make {4 * WIDE.page_bytes:,}, on branch wide"
    did = story.ok("convert", "story", "--like", "other", "--as", "wide").lines
    cid = story.ok("log", "wide", "-n", "1", "-q").out.strip()
    assert did[:5] == would[:5]
    assert did[5:] == [
        f"converted {4 * WIDE.page_bytes:,} bytes, {4 * WIDE.page_bytes:,} of them new",
        f"branch wide names {cid}: not bit-exact",
    ]
    assert story.ok("convert", "story", "--like", "other", "--as", "wide", "-q").lines == [cid]
    again = story.ok("convert", "story", "--like", "other", "--as", "wide").lines
    assert again[-1] == f"nothing to convert: branch wide is that already, {cid[7:19]}"


def test_takes_the_layout_from_a_file_and_from_stdin(story: Kvist, tmp_path_factory: pytest.TempPathFactory) -> None:
    document = json.dumps({"layouts": [dataclasses.asdict(WIDE)], "numerics": {}})
    file = tmp_path_factory.mktemp("layout") / "layout.json"
    file.write_text(document)
    cid = story.ok("convert", "story", "--to-layout", str(file), "-q").out
    assert story("convert", "story", "--to-layout", "-", "-q", stdin=document).out == cid


def test_says_what_is_left_out_and_lost(story: Kvist) -> None:
    with story.opened() as repo:
        manifest = put_manifest(repo, 0, 3)
        seq = replace(manifest.sequences[0], page_ixs=(0, 1), token_ids=(), state={"grammar": 1})
        repo.commit([replace(manifest, sequences=(seq,))], branch="less")
    did = story.ok("convert", "less", "--like", "other").lines
    assert did[5:7] == [
        "1 pages are left out: no sequence names them",
        "s does not keep: grammar: what it means is known to its engine only",
    ]


def test_refuses(story: Kvist) -> None:
    assert story("convert", "story").code == 2
    assert story("convert", "story", "--like", "other", "--to-layout", "-").code == 2
    ran = story("convert", "story", "--like", "story", "--json")
    assert (ran.code, ran.error["kind"], ran.error["hint"]) == (2, "invalid_input", "check it out as it is")
    with story.opened() as repo:
        repo.commit([replace(put_manifest(repo, 0, 0), layout=replace(WIDE, model="org/other"))], branch="model")
    ran = story("convert", "story", "--like", "model", "--json")
    assert (ran.code, ran.error["kind"]) == (12, "layout_mismatch")
    assert "model 'org/tiny' there, 'org/other' wanted" in ran.error["message"]
    assert story("convert", "story", "--to-layout", "-", "--json", stdin="{}").error["kind"] == "invalid_input"
    assert story("convert", "nothing", "--like", "other", "--json").error["kind"] == "not_found"


def test_without_numpy_it_says_what_to_install(story: Kvist, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in [name for name in sys.modules if name.startswith(("kvist.pager", "kvist.cli.convert"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "numpy", None)
    ran = run(("convert", "story", "--like", "other"), {"KVIST_STORE": story.url})
    assert ran.code == 1 and "numpy, which is not installed" in ran.err and "pip install 'kvist[sim]'" in ran.err
