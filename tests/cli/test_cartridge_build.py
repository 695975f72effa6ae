"""`kvist cartridge build`."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvist.cartridge.cartridge import Cartridge
from kvist.testing.models import make_model, make_tokenizer, words

from .conftest import Ran, run


def kvist(*args: object) -> Ran:
    return run([str(arg) for arg in args], {})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    return make_tokenizer(make_model(directory, layers=2, hidden=32, heads=2, kv_heads=1, max_len=256))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "doc.txt"
    path.write_text(words(10))
    return path


def test_build(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "made"
    words_ = ["--model", model, "--text", text, "-o", out, "--label", "a=b=c", "--license", "MIT"]
    told = kvist("cartridge", "build", *words_, "--json").json
    with Cartridge.from_pretrained(out) as made:
        assert told == {
            "cartridge_id": "made",
            "identity": made.identity,
            "directory": str(out),
            "tokens": made.num_tokens,
            "bytes": made.nbytes,
        }
        assert (made.manifest.labels, made.manifest.license) == ({"a": "b=c"}, "MIT")
        assert made.manifest.source_document == "doc.txt"
    ran = kvist("cartridge", "build", *words_)
    assert (ran.code, ran.out) == (5, "") and "is there already" in ran.err
    assert kvist("cartridge", "build", *words_[:4], "-o", tmp_path / "b", "--id", "x/y", "-q").out == "x/y\n"
    ran = kvist("cartridge", "build", *words_[:4], "-o", tmp_path / "c")
    assert ran.out == f"c: {told['tokens']} tokens, {told['bytes']:,} bytes, in {tmp_path / 'c'}\n"


def test_a_system_message(model: Path, text: Path, tmp_path: Path) -> None:
    kvist("cartridge", "build", "--model", model, "--text", text, "-o", tmp_path / "a", "--system")
    with Cartridge.from_pretrained(tmp_path / "a") as made:
        assert made.manifest.provenance["prompt"] == {
            "kind": "system",
            "opening": "<|bos|><|system|>",
            "closing": "<|end|>",
        }
        assert str(made.manifest.chat_template_hash).startswith("sha256:")


@pytest.mark.parametrize(
    ("given", "code", "kind"),
    [
        (["--max-tokens", "3"], 2, "invalid_input"),
        (["--device", "tpu"], 2, "invalid_input"),
        (["--dtype", "int8"], 2, "invalid_input"),
        (["--label", "x"], 2, "usage"),
        (["--id", "../x"], 20, "invalid_cartridge"),
        (["--chunk", "0"], 2, "usage"),
    ],
)
def test_refused(model: Path, text: Path, tmp_path: Path, given: list[str], code: int, kind: str) -> None:
    out = tmp_path / "out"
    ran = kvist("cartridge", "build", "--model", model, "--text", text, "-o", out, "--json", *given)
    assert (ran.code, ran.error["kind"]) == (code, kind)
    assert not out.exists()


def test_texts_that_are_none(model: Path, text: Path, tmp_path: Path) -> None:
    args = ["cartridge", "build", "--model", model, "--text", text, "-o", tmp_path / "out", "--json"]
    text.write_bytes(b"\xff\xfe")
    assert "UTF-8" in kvist(*args).error["message"]
    text.write_text(" \n")
    assert "no text" in kvist(*args).error["message"]
    text.write_text("x" * 300)
    assert "the model has 256 positions" in kvist(*args).error["message"]
    text.unlink()
    assert kvist(*args).error["kind"] == "usage"
