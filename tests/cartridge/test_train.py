"""The pieces of training: what a step sees, the loss, and that a run which was stopped ends as one that was not."""

from __future__ import annotations

import collections
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from kvist.cartridge.causal import CausalModel, Layers
from kvist.cartridge.framing import Framing
from kvist.cartridge.train import Conversation, Distillation, Trainer, TrainSettings, read_conversations
from kvist.cartridge.train.conversations import Example, draw_order, make_example, pad, write_conversations
from kvist.cartridge.train.loss import divergence
from kvist.cartridge.train.plot import png
from kvist.cartridge.train.student import Student, start_of
from kvist.errors import EngineError, InvalidInput

DOCUMENT = [1] + [(7 + 31 * number) % 500 for number in range(63)]
EXAMPLES = [Example(tuple(range(10 + 7 * n, 20 + 8 * n)), 4 + n % 3) for n in range(6)]
SETTINGS = TrainSettings(tokens=12, steps=9, batch=4, rows=2, warmup=2, seed=3)


def equal(a: Layers, b: Layers) -> bool:
    return all(torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


# -- the run -----------------------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(tiny: CausalModel, tmp_path: Path) -> None:
    whole = Trainer(tiny, DOCUMENT, EXAMPLES, SETTINGS).run()

    class Stopped(Exception):
        pass

    def stop_at(step: int) -> None:
        def progress(done: int, total: int) -> None:
            if done == step:
                raise Stopped

        with pytest.raises(Stopped):
            Trainer(tiny, DOCUMENT, EXAMPLES, SETTINGS).run(saves=tmp_path / "c", every=2, progress=progress)

    stop_at(3)  # one step after a checkpoint: it is done again
    stop_at(6)
    resumed = Trainer(tiny, DOCUMENT, EXAMPLES, SETTINGS).run(saves=tmp_path / "c", every=2)
    assert resumed.losses == whole.losses and equal(resumed.layers, whole.layers)
    again = Trainer(tiny, DOCUMENT, EXAMPLES, SETTINGS).run(
        saves=tmp_path / "c", every=2
    )  # there is nothing left to do
    assert again.losses == whole.losses and equal(again.layers, whole.layers)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "c"]


def test_what_training_changes(tiny: CausalModel) -> None:
    before = [(keys.clone(), values.clone()) for keys, values in tiny.prefill(DOCUMENT[:12])]
    settings = TrainSettings(tokens=12, frozen_tokens=3, steps=30, batch=6, rows=6, rate=0.3)
    trained = Trainer(tiny, DOCUMENT, EXAMPLES, settings).run()
    for old, new in zip(before, trained.layers, strict=True):
        for a, b in zip(old, new, strict=True):
            assert torch.equal(a[:3], b[:3]) and not torch.isclose(a[3:], b[3:]).all()
    assert sum(trained.losses[-5:]) < sum(trained.losses[:5]) / 2
    assert all(parameter.grad is None for parameter in tiny._model.parameters())
    assert equal(before, tiny.prefill(DOCUMENT[:12]))


def test_a_cartridge_as_long_as_the_document_has_nothing_to_learn(tiny: CausalModel) -> None:
    settings = TrainSettings(tokens=len(DOCUMENT), steps=1, batch=6)
    assert Trainer(tiny, DOCUMENT, EXAMPLES, settings).run().losses[0] < 1e-6


def test_how_a_step_is_cut_into_passes_does_not_matter_but_for_rounding(tiny: CausalModel) -> None:
    losses = [
        Trainer(tiny, DOCUMENT, EXAMPLES, TrainSettings(tokens=12, steps=3, batch=6, rows=rows, warmup=0)).run().losses
        for rows in (1, 4, 6)
    ]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-3)


def test_another_seed_is_another_run(tiny: CausalModel) -> None:
    one, two = (Trainer(tiny, DOCUMENT, EXAMPLES, TrainSettings(tokens=9, steps=2, batch=2, seed=n)) for n in (0, 1))
    assert one.run().losses != two.run().losses


@pytest.mark.parametrize("changes", [{"rate": 1e-2}, {"seed": 4}, {"steps": 12}, {"top_k": 5}])
def test_the_checkpoint_of_another_run(tiny: CausalModel, tmp_path: Path, changes: dict[str, float]) -> None:
    Trainer(tiny, DOCUMENT, EXAMPLES, SETTINGS).run(saves=tmp_path / "c")
    other = TrainSettings(**{**SETTINGS.document(), **changes})
    with pytest.raises(InvalidInput, match=f"is of another run: {next(iter(changes))}: "):
        Trainer(tiny, DOCUMENT, EXAMPLES, other).run(saves=tmp_path / "c")
    with pytest.raises(InvalidInput, match="conversations"):
        Trainer(tiny, DOCUMENT, EXAMPLES[1:], SETTINGS).run(saves=tmp_path / "c")
    with pytest.raises(InvalidInput, match="document"):
        Trainer(tiny, DOCUMENT[:-1], EXAMPLES, SETTINGS).run(saves=tmp_path / "c")


def test_files_that_are_no_checkpoint(tiny: CausalModel, tmp_path: Path) -> None:
    path = tmp_path / "c"
    trainer = Trainer(tiny, DOCUMENT, EXAMPLES, SETTINGS)
    for data in (b"", b"x" * 100, b"\x80\x04."):
        path.write_bytes(data)
        with pytest.raises(InvalidInput, match="cannot read the checkpoint"):
            trainer.run(saves=path)
    save_file({"losses": torch.zeros(3)}, path)
    with pytest.raises(InvalidInput, match="no checkpoint"):
        trainer.run(saves=path)


def test_a_loss_that_is_no_number(tiny: CausalModel) -> None:
    with pytest.raises(EngineError, match=r"the loss of step \d+ is") as caught:
        Trainer(tiny, DOCUMENT, EXAMPLES, TrainSettings(tokens=9, steps=50, rate=3e37, warmup=0)).run()
    assert caught.value.hint == "train with a lower --rate"


def test_half_precision_is_trained_in_single(tiny_directory: Path) -> None:
    model = CausalModel.open(tiny_directory, dtype="bfloat16")
    settings = TrainSettings(tokens=9, steps=4, rate=1e-5, warmup=0)  # far below what bfloat16 can tell apart
    trainer = Trainer(model, DOCUMENT, EXAMPLES, settings)
    before = [parameter.detach().clone() for parameter in trainer._student.parameters]
    trained = trainer.run()
    assert trained.layers[0][0].dtype == torch.bfloat16
    for old, new in zip(before, trainer._student.parameters, strict=True):
        assert new.dtype == torch.float32 and not torch.equal(old, new)


# -- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": 0},
        {"tokens": 4, "frozen_tokens": 4},
        {"tokens": 4, "steps": 0},
        {"tokens": 4, "batch": 0},
        {"tokens": 4, "rate": 0.0},
        {"tokens": 4, "rate": float("nan")},
        {"tokens": 4, "top_k": 0},
        {"tokens": 4, "start": "random"},
    ],
)
def test_settings_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match=next(reversed(wrong))):
        TrainSettings(**wrong)


def test_the_rate_grows_and_falls() -> None:
    settings = TrainSettings(tokens=4, steps=100, warmup=10, rate=1.0)
    rates = [settings.rate_at(step) for step in range(100)]
    assert max(rates) == rates[10] == 1.0 and 0 < rates[0] < 0.1 and 0 < rates[99] < 0.02
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_a_cartridge_longer_than_the_document(tiny: CausalModel) -> None:
    with pytest.raises(InvalidInput, match=r"in \[1, 64\]"):
        Trainer(tiny, DOCUMENT, EXAMPLES, TrainSettings(tokens=65))
    with pytest.raises(InvalidInput, match="at least one conversation"):
        Trainer(tiny, DOCUMENT, [], SETTINGS)


# -- the student -------------------------------------------------------------------------------------------------


@given(tokens=st.integers(2, 64), seed=st.integers(0, 5))
def test_spread_takes_the_first_piece_and_others_in_order(tiny: CausalModel, tokens: int, seed: int) -> None:
    from kvist.cartridge.train.student import _spread

    places = _spread(64, tokens, seed)
    assert len(places) == tokens == len(set(places)) and places == sorted(places) and places[0] == 0
    assert places == _spread(64, tokens, seed)


def test_where_training_begins(tiny: CausalModel) -> None:
    whole = tiny.prefill(DOCUMENT)
    first = start_of(tiny, DOCUMENT, 10, "first", 0)
    for (keys, values), (all_keys, all_values) in zip(first, whole, strict=True):
        torch.testing.assert_close(keys, all_keys[:10])
        torch.testing.assert_close(values, all_values[:10])
    spread = start_of(tiny, DOCUMENT, 10, "spread", 0)
    assert spread[0][0].shape == first[0][0].shape and not torch.equal(spread[1][0], first[1][0])


@pytest.mark.parametrize("frozen", [-1, 12, 13])
def test_something_must_be_trained(tiny: CausalModel, frozen: int) -> None:
    with pytest.raises(InvalidInput, match="frozen"):
        Student(tiny.prefill(DOCUMENT[:12]), frozen)


# -- the loss ----------------------------------------------------------------------------------------------------


def test_the_loss_is_the_divergence_of_each_token() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 30, generator=generator) for _ in range(2))
    expected = torch.nn.functional.kl_div(
        torch.log_softmax(student, -1), torch.log_softmax(teacher, -1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(divergence(student, teacher), expected)
    torch.testing.assert_close(divergence(student, teacher, 30), expected)
    assert divergence(teacher, teacher).abs().max() < 1e-6


@pytest.mark.parametrize("top_k", [1, 3, 29])
def test_the_loss_over_few_ids(top_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 30, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = teacher.softmax(-1), student.softmax(-1)
    for row in range(5):
        likeliest = sorted(range(30), key=lambda one, row=row: -float(p[row, one]))[:top_k]
        expected = sum(float(p[row, one] * (p[row, one].log() - q[row, one].log())) for one in likeliest)
        assert float(divergence(student, teacher, top_k)[row]) == pytest.approx(expected)


# -- data --------------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 40), take=st.integers(1, 25), seed=st.integers(0, 3), steps=st.integers(1, 12))
def test_each_epoch_sees_everything_once(count: int, take: int, seed: int, steps: int) -> None:
    drawn = [one for step in range(steps) for one in draw_order(count, take, step, seed)]
    assert len(drawn) == steps * take
    for start in range(0, len(drawn) - count + 1, count):
        assert sorted(drawn[start : start + count]) == list(range(count))
    counts = collections.Counter(drawn)
    assert max(counts.values()) - min(counts.get(one, 0) for one in range(count)) <= 1


def test_rows_predict_completions_alone() -> None:
    rows = pad([Example((1, 2, 3, 4), 2), Example((5, 6), 1)])
    assert rows.ids.tolist() == [[1, 2, 3, 4], [5, 6, 0, 0]]
    assert rows.predicts.tolist() == [[False, True, True, False], [True, False, False, False]]


def test_files_of_conversations(tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    talks = [Conversation(prompt="a\nb", completion="c", kind="question"), Conversation(prompt="ä", is_cut=True)]
    write_conversations(path, talks)
    write_conversations(path, [])
    assert read_conversations(path) == talks
    assert json.loads(path.read_text().splitlines()[1]) == {"prompt": "ä", "is_cut": True}


@pytest.mark.parametrize(
    "line",
    ["", "[]", "{", '{"prompt": ""}', '{"prompt": 1}', '{"completion": "x"}', '{"prompt": "x", "extra": 1}', "é" * 9],
)
def test_lines_that_are_no_conversation(tmp_path: Path, line: str) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text('{"prompt": "x"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(InvalidInput, match=r"talks\.jsonl:2: expected"):
        read_conversations(path)
    path.write_text("")
    with pytest.raises(InvalidInput, match="at least one line"):
        read_conversations(path)
    with pytest.raises(InvalidInput, match="cannot read"):
        read_conversations(tmp_path / "nothing")


def test_ids_of_a_conversation(tiny: CausalModel) -> None:
    framing = Framing(tiny.tokenizer)
    one = Conversation(prompt="who keeps it?", completion=" ada")
    example = make_example(one, framing, 2, 100)
    assert list(example.ids) == [*framing.prompt("who keeps it?"), *framing.answer(" ada"), 2]
    assert example.learnt == len(framing.answer(" ada")) + 1
    cut = make_example(Conversation(prompt="who?", completion=" ada", is_cut=True), framing, 2, None)
    assert cut.ids[-1] != 2
    with pytest.raises(InvalidInput, match="there is room for 3"):
        make_example(one, framing, 2, 3)


def test_answers_that_are_lacking_are_the_teachers(tiny: CausalModel) -> None:
    talks = [Conversation(prompt=" a"), Conversation(prompt=" b", completion="c"), Conversation(prompt=" the dog")]
    framing = Framing(tiny.tokenizer)
    made = Distillation(tiny, framing, "the quick brown fox", talks, answer_tokens=5)
    document = framing.document("the quick brown fox")
    (said,) = tiny.generate([document + framing.prompt(" the dog")], None, most=5)
    again = framing.answer(framing.decode(said))  # random weights say bytes that are no text
    assert list(made.examples[2].ids[made.examples[2].start :][: len(again)]) == again
    assert made.examples[1].ids[made.examples[1].start :] == (*framing.answer("c"), tiny.end)


def test_a_document_that_leaves_no_room(tiny: CausalModel) -> None:
    with pytest.raises(InvalidInput, match="room"):
        Distillation(tiny, Framing(tiny.tokenizer), "x " * 600, [Conversation(prompt="a", completion="b")])


def test_what_the_manifest_of_a_trained_cartridge_says(tiny: CausalModel) -> None:
    talks = [Conversation(prompt=" a", completion=" b")]
    made = Distillation(tiny, Framing(tiny.tokenizer), "the quick brown fox jumps over the lazy dog", talks)
    settings = TrainSettings(tokens=5, frozen_tokens=2, steps=3, batch=1)
    cartridge = made.package(made.train(settings), settings, cartridge_id="t", labels={"a": "b"})
    manifest = cartridge.manifest
    assert (manifest.num_tokens_raw, manifest.num_frozen_tokens, manifest.training_steps) == (5, 2, 3)
    assert cartridge.token_ids is None and not manifest.has_token_ids
    assert manifest.provenance["settings"] == settings.document()
    assert manifest.provenance["document_tokens"] == len(made.document)


# -- the plot ----------------------------------------------------------------------------------------------------


def test_the_plot() -> None:
    losses = [2.0 / (step + 1) for step in range(60)]
    assert png(losses, "x").startswith(b"\x89PNG") and png(losses, "x") == png(losses, "x")
    assert png([0.1, -0.01], "negative").startswith(b"\x89PNG")
