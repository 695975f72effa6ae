"""`kvist cartridge train` and `eval`, on the model that has learnt to recall."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvist.cartridge.cartridge import Cartridge
from kvist.testing.recall import FORMS, draw_document

from .conftest import Ran, run

RECALL = Path(__file__).parents[1] / "data" / "recall"


def kvist(*args: object) -> Ran:
    return run([str(arg) for arg in args], {})


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The files of a document of ten facts."""
    document = draw_document(10, seed=1)
    lines = {"talks": document.conversations(), "questions": document.questions(FORMS[2], 4)}
    (tmp_path / "doc.txt").write_text(document.text)
    for name, found in lines.items():
        (tmp_path / name).write_text("".join(json.dumps(one) + "\n" for one in found))
    return {name: tmp_path / name for name in ("doc.txt", "talks", "questions")}


def training(files: dict[str, Path], output: Path, *more: object, steps: int = 4) -> Ran:
    args: list[Any] = ["--model", RECALL, "--text", files["doc.txt"], "--system", "-o", output, "--tokens", 8]
    return kvist("cartridge", "train", *args, "--batch", 4, "--steps", steps, *more)


def test_train(files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "short"
    told = training(files, out, "--conversations", files["talks"], "--json").json
    with Cartridge.from_pretrained(out) as made:
        assert (told["cartridge_id"], told["identity"]) == ("short", made.identity)
        assert (told["tokens"], told["steps"], len(told["losses"])) == (8, 4, 4)
        assert (made.manifest.training_steps, made.manifest.num_frozen_tokens) == (4, 1)
    assert told["document_tokens"] == 63 and told["losses"][0] == told["first_loss"]
    beside = tmp_path / "short.training"
    assert told["training"] == str(beside)
    assert {path.name for path in beside.iterdir()} == {"checkpoint.safetensors", "loss.png"}


def test_resume(files: dict[str, Path], tmp_path: Path) -> None:
    whole = training(files, tmp_path / "a", "--conversations", files["talks"], "--json").json
    again = training(files, tmp_path / "b", "--conversations", files["talks"], "--every", "1", "--json").json
    assert again["identity"] == whole["identity"] and again["losses"] == whole["losses"]
    (tmp_path / "b" / "cartridge.json").unlink()  # as if it had been killed right before the end
    for path in (tmp_path / "b").iterdir():
        path.unlink()
    ran = training(files, tmp_path / "b", "--conversations", files["talks"], "--json")
    assert (ran.code, ran.error["kind"]) == (5, "already_exists") and "--resume" in ran.error["hint"]
    resumed = training(files, tmp_path / "b", "--conversations", files["talks"], "--resume", "--json").json
    assert resumed["identity"] == whole["identity"]
    ran = training(files, tmp_path / "c", "--conversations", files["talks"], "--resume", "--json")
    assert ran.json["identity"] == whole["identity"]  # nothing to resume is no error
    (tmp_path / "d.training").mkdir()
    (tmp_path / "a.training" / "checkpoint.safetensors").rename(tmp_path / "d.training" / "checkpoint.safetensors")
    ran = training(files, tmp_path / "d", "--conversations", files["talks"], "--resume", "--json", steps=5)
    assert (ran.code, ran.error["kind"]) == (2, "invalid_input") and "steps: 4 then, 5 now" in ran.error["message"]


def test_self_study(files: dict[str, Path], tmp_path: Path) -> None:
    told = training(files, tmp_path / "a", "--self-study", 3, "--answer-tokens", 4, "--json", steps=1).json
    lines = (tmp_path / "a.training" / "conversations.jsonl").read_text().splitlines()
    assert 1 <= len(lines) <= 3 and all(json.loads(line)["prompt"] for line in lines)
    assert told["tokens"] == 8


def test_refused(files: dict[str, Path], tmp_path: Path) -> None:
    ran = training(files, tmp_path / "a", "--json")
    assert (ran.code, ran.error["kind"]) == (2, "usage")
    ran = training(files, tmp_path / "a", "--conversations", files["talks"], "--self-study", 3, "--json")
    assert (ran.code, ran.error["kind"]) == (2, "usage")
    ran = training(files, tmp_path / "a", "--conversations", files["talks"], "--tokens", 64, "--json")
    assert (ran.code, ran.error["kind"]) == (2, "invalid_input") and "document's length" in ran.error["message"]
    assert not (tmp_path / "a").exists()


# -- eval --------------------------------------------------------------------------------------------------------


def judging(files: dict[str, Path], *more: object) -> Ran:
    args: list[Any] = ["--model", RECALL, "--text", files["doc.txt"], "--questions", files["questions"], "--system"]
    return kvist("cartridge", "eval", *args, "--answer-tokens", 3, *more)


def test_eval(files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "short"
    training(files, out, "--conversations", files["talks"], "--tokens", 16, "--batch", 16, steps=60)
    told = judging(files, out, "--record", "--json").json
    arms = {arm["arm"]: arm for arm in told["arms"]}
    assert list(arms) == [
        "no context",
        "full document",
        "lossless cartridge",
        "short",
        "first 16 tokens, untrained",
    ]
    assert arms["full document"]["right"] == arms["lossless cartridge"]["right"] == 4
    assert arms["no context"]["right"] < 4 and arms["short"]["loss"] < arms["first 16 tokens, untrained"]["loss"]
    assert told["worse_than_no_context"] == [] and len(told["answers"]) == 4
    with Cartridge.from_pretrained(out) as made:
        quality = made.manifest.provenance["quality"]
        assert quality["verdict"] == told["verdicts"]["short"] and quality["arms"] == told["arms"]
        assert made.manifest.provenance["method"] == "context distillation"
    ran = judging(files, out)
    assert ran.code == 0 and ran.lines[0].split()[:2] == ["in", "front"] and ran.lines[-1].startswith("short: ")


def test_a_cartridge_that_is_worse_than_nothing(files: dict[str, Path], tmp_path: Path) -> None:
    out, other = tmp_path / "bad", tmp_path / "other.txt"
    other.write_text(draw_document(40, seed=2).text)  # says something else of each name
    kvist("cartridge", "build", "--model", RECALL, "--text", other, "--system", "-o", out)
    ran = judging(files, out, "--json")
    assert (ran.code, ran.json["worse_than_no_context"]) == (3, ["bad"])
    assert judging(files, out, "-q").out == "bad\n"


def test_without_cartridges(files: dict[str, Path]) -> None:
    assert [arm["arm"] for arm in judging(files, "--json").json["arms"]] == [
        "no context",
        "full document",
        "lossless cartridge",
    ]


def test_a_cartridge_that_was_framed_in_another_way(files: dict[str, Path], tmp_path: Path) -> None:
    kvist("cartridge", "build", "--model", RECALL, "--text", files["doc.txt"], "-o", tmp_path / "bare")
    ran = judging(files, tmp_path / "bare", "--json")
    assert (ran.code, ran.error["message"]) == (2, "bare was made of bare text")
    assert ran.error["hint"] == "ask without --system"


def test_a_cartridge_of_another_model(files: dict[str, Path], tmp_path: Path) -> None:
    from kvist.testing.models import make_model, make_tokenizer

    other = make_tokenizer(make_model(tmp_path / "other", layers=2, hidden=32, heads=2, kv_heads=1))
    kvist("cartridge", "build", "--model", other, "--text", files["doc.txt"], "-o", tmp_path / "x")
    ran = judging(files, tmp_path / "x", "--json")
    assert (ran.code, ran.error["kind"]) == (12, "layout_mismatch")
