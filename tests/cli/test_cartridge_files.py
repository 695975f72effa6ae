"""`kvist cartridge show`, `verify`, `commit` and `export`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cartridge.making import make_cartridge, same
from kvist.cartridge.cartridge import Cartridge
from kvist.cartridge.model import ModelIdentity
from kvist.repo import LogicalSeq, Manifest, PageEntry, RefKind

from .conftest import LAYOUT, Kvist, half


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    made = make_cartridge(num_frozen_tokens=1, training_steps=1270, labels={"patient": "01"}, license="mit", ids=False)
    return made.save_pretrained(tmp_path / "saved")


def write_model(directory: Path, **changes: object) -> Path:
    """The configuration of the model that `make_cartridge` is for."""
    config = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3, "rope_theta": 10000.0}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"} | changes))
    return directory


# -- show and verify ---------------------------------------------------------------------------------------------


def test_show(kvist: Kvist, saved: Path) -> None:
    shown = kvist.ok("cartridge", "show", str(saved), "--json").json
    manifest = json.loads((saved / "cartridge.json").read_text())
    assert shown == manifest | {"directory": str(saved), "identity": make_cartridge(ids=False).identity}
    text = kvist.ok("cartridge", "show", str(saved)).out
    for said in ("patient/01", "1,270 steps", "the first 1 frozen", "org/tiny", "3 x 2 KV heads x 8, bfloat16", "mit"):
        assert said in text
    assert "label patient  01" in text and manifest["files"][0]["sha256"] in text and "rope_theta 10000.0" in text
    assert kvist.ok("cartridge", "show", str(saved), "-q").out == "patient/01\n"


def test_show_reads_no_torch(saved: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from kvist.cli.main import main\n"
        f"try: main(['cartridge', 'show', {str(saved)!r}])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_show_of_what_is_none(kvist: Kvist, tmp_path: Path) -> None:
    ran = kvist("cartridge", "show", str(tmp_path / "none"), "--json")
    assert (ran.code, ran.error["kind"]) == (4, "not_found")
    ran = kvist("cartridge", "show", str(tmp_path), "--json")
    assert (ran.code, ran.error["kind"]) == (20, "invalid_cartridge")
    (tmp_path / "old.pt").write_bytes(b"x")
    ran = kvist("cartridge", "show", str(tmp_path / "old.pt"))
    assert ran.code == 2 and "hint: kvist cartridge import" in ran.err


def test_verify(kvist: Kvist, saved: Path, tmp_path: Path) -> None:
    done = kvist.ok("cartridge", "verify", str(saved), "--json").json
    size = sum(path.stat().st_size for path in saved.glob("*.safetensors"))
    identity = make_cartridge(ids=False).identity
    assert done == {
        "cartridge_id": "patient/01",
        "identity": identity,
        "tokens": 37,
        "files": 1,
        "bytes": size,
        "model": None,
    }
    assert kvist.ok("cartridge", "verify", str(saved)).out == f"patient/01 is whole: 37 tokens, {size:,} bytes read\n"
    model = write_model(tmp_path / "tiny")
    ran = kvist.ok("cartridge", "verify", str(saved), "--model", str(model))
    assert ran.out.endswith(f"; fits {model}\n")
    assert kvist.ok("cartridge", "verify", str(saved), "-q").out == "patient/01\n"


def test_verify_finds_damage(kvist: Kvist, saved: Path) -> None:
    path = saved / "cartridge.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    ran = kvist("cartridge", "verify", str(saved), "--json")
    assert (ran.code, ran.error["kind"]) == (20, "damaged_cartridge")
    assert "SHA-256" in ran.error["message"]
    path.unlink()
    assert kvist("cartridge", "verify", str(saved)).code == 20


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 4}, {"rope_theta": 5e5}, {"head_dim": 16}])
def test_verify_refuses_another_model(kvist: Kvist, saved: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    ran = kvist("cartridge", "verify", str(saved), "--model", str(write_model(tmp_path / "tiny", **changes)), "--json")
    assert (ran.code, ran.error["kind"]) == (12, "layout_mismatch")


# -- commit and export -------------------------------------------------------------------------------------------


def test_there_and_back(kvist: Kvist, saved: Path, tmp_path: Path) -> None:
    done = kvist.ok("cartridge", "commit", str(saved), "--json").json
    assert done["branch"] == "cartridge/patient/01" and done["tokens"] == 37
    assert done["identity"] == make_cartridge(ids=False).identity
    shown = kvist.ok("show", "cartridge/patient/01", "--json").json
    assert shown["cid"] == done["cid"]
    kvist.ok("fsck")
    again = kvist.ok("cartridge", "commit", str(saved), "--name", "x", "--page-size", "64").out
    assert again.startswith("branch cartridge/x names sha256:")
    for rev in ("cartridge/patient/01", "cartridge/x"):
        target = tmp_path / rev.replace("/", "-")
        made = kvist.ok("cartridge", "export", rev, "-o", str(target), "--json").json
        assert made["directory"] == str(target) and made["tokens"] == 37 and not made["has_token_ids"]
        with Cartridge.from_pretrained(target) as back, Cartridge.from_pretrained(saved) as first:
            assert same(back, first) and back.manifest == first.manifest and back.identity == made["identity"]


def test_committed_again_it_is_no_new_snapshot(kvist: Kvist, saved: Path) -> None:
    first = kvist.ok("cartridge", "commit", str(saved), "-q").lines
    assert kvist.ok("cartridge", "commit", str(saved), "-q").lines == first


def put_session(kvist: Kvist, *names: str) -> str:
    """A snapshot of an engine with a session of seven tokens under each name."""
    with kvist.opened() as repo:
        digests = repo.put_pages([half(n) for n in range(4)]).digests
        pages = (PageEntry(0, *digests[:2]), PageEntry(1, *digests[2:]))
        ids = tuple(range(30, 37))
        sequences = tuple(LogicalSeq(name, (0, 1), 3, ids) for name in names)
        return repo.commit([Manifest(LAYOUT, pages, sequences)], branch="main").cid


def test_export_of_a_session(kvist: Kvist, tmp_path: Path) -> None:
    put_session(kvist, "doc")
    model = write_model(tmp_path / "tiny", num_hidden_layers=2, num_key_value_heads=1, head_dim=8)
    words = ["--tokens", "5", "--id", "doc/1", "--label", "a=b=c", "--label", "d=", "--model", str(model)]
    ran = kvist.ok("cartridge", "export", "main", "-o", str(tmp_path / "c"), *words)
    assert ran.out.startswith(f"doc/1 is in {tmp_path / 'c'}: 5 tokens, ")
    with Cartridge.from_pretrained(tmp_path / "c") as made:
        assert made.token_ids == (30, 31, 32, 33, 34) and made.manifest.labels == {"a": "b=c", "d": ""}
        assert made.manifest.model == ModelIdentity.of_directory(model, model_id="org/tiny", revision="r1")


def test_export_refused(kvist: Kvist, saved: Path, tmp_path: Path) -> None:
    put_session(kvist, "a", "b")
    target = tmp_path / "c"

    def refused(*words: str) -> tuple[int, str]:
        ran = kvist("cartridge", "export", *words, "--json")
        assert not target.exists()
        return ran.code, ran.error["kind"]

    assert refused("main", "-o", str(target)) == (2, "invalid_input")
    assert refused("main", "-o", str(target), "--sequence", "c") == (4, "not_found")
    assert refused("none", "-o", str(target)) == (4, "not_found")
    assert refused("main", "-o", str(target), "--sequence", "a", "--tokens", "8") == (2, "invalid_input")
    assert refused("main", "-o", str(target), "--sequence", "a", "--label", "x") == (2, "usage")
    assert refused("main", "-o", str(target), "--sequence", "a", "--id", "../x") == (20, "invalid_cartridge")
    assert refused("main", "--sequence", "a") == (2, "usage")
    wrong = write_model(tmp_path / "big", num_hidden_layers=5)
    assert refused("main", "-o", str(target), "--sequence", "a", "--model", str(wrong)) == (12, "layout_mismatch")
    assert refused("main", "-o", str(saved), "--sequence", "a") == (5, "already_exists")
    with kvist.opened() as repo:
        assert repo.refs.names(RefKind.BRANCH) == ["main"]


def test_commit_refused(kvist: Kvist, saved: Path, tmp_path: Path) -> None:
    assert kvist("cartridge", "commit", str(saved), "--name", "../x").code == 2
    assert kvist("cartridge", "commit", str(tmp_path / "none")).code == 4
    ran = kvist("--store", str(tmp_path / "no-store"), "cartridge", "commit", str(saved), "--json")
    assert (ran.code, ran.error["kind"]) == (10, "repository_not_found")
    (saved / "cartridge.safetensors").write_bytes(b"x")
    assert kvist("cartridge", "commit", str(saved), "--json").error["kind"] == "damaged_cartridge"
    assert kvist.ok("branch", "-q").out == ""
