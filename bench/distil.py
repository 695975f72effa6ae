"""What distilled cartridges are worth, on a task that only the context can answer: every arm, over held-out documents.

The model and the task are those of ``tests/data/recall`` and `kvist.testing.recall`. A cartridge is trained on all
facts of its document in two wordings, and asked ten of them in a third. "untrained" is what training began with: the
document's first tokens.

    python bench/distil.py [--documents N] [--steps N] [--rate R]
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path

import torch

from kvist.cartridge.causal import CausalModel
from kvist.cartridge.evaluate import LOSSLESS, Arm, Question, evaluate
from kvist.cartridge.framing import Framing
from kvist.cartridge.train import Conversation, Distillation, TrainSettings
from kvist.testing.recall import FORMS, draw_document

RECALL = Path(__file__).parents[1] / "tests" / "data" / "recall"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=RECALL)
    parser.add_argument("--documents", type=int, default=6)
    parser.add_argument("--first", type=int, default=0, help="seed of the first document")
    parser.add_argument("--facts", type=int, nargs="+", default=[22, 30, 38])
    parser.add_argument("--shares", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--start", choices=["first", "spread"], default="first")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = CausalModel.open(arguments.model)
    framing = Framing(model.tokenizer, is_chat=True)
    arms: dict[str, list[Arm]] = defaultdict(list)
    took = []
    for seed in range(arguments.first, arguments.first + arguments.documents):
        document = draw_document(arguments.facts[seed % len(arguments.facts)], seed=seed)
        talks = [Conversation(**one) for one in document.conversations(FORMS[:2])]
        questions = [Question(**one) for one in document.questions(FORMS[2], 10, seed=seed)]
        distillation = Distillation(model, framing, document.text, talks)
        length = len(distillation.document)
        whole = model.prefill(distillation.document)
        cartridges = {LOSSLESS: whole}
        for share in arguments.shares:
            settings = TrainSettings(
                tokens=length // share, steps=arguments.steps, rate=arguments.rate, start=arguments.start, rows=16
            )
            begun = time.monotonic()
            cartridges[f"1/{share} trained"] = distillation.train(settings).layers
            took.append(time.monotonic() - begun)
            cartridges[f"1/{share} untrained"] = [
                (keys[: settings.tokens], values[: settings.tokens]) for keys, values in whole
            ]
        report = evaluate(model, framing, document.text, questions, cartridges=cartridges, matches="exact", most=4)
        for arm in report.arms:
            arms[arm.name].append(arm)
        print(
            f"document {seed}: {length} tokens,",
            ", ".join(f"{arm.name} {arm.right}" for arm in report.arms),
            flush=True,
        )
    mean = sum(took) / len(took)
    print(f"\n{arguments.steps} steps, a rate of {arguments.rate:g}, {mean:.0f} s a cartridge, one thread\n")
    print("| in front of the question | tokens | right | loss | divergence |\n| --- | --- | --- | --- | --- |")
    for name, found in arms.items():
        asked, tokens = sum(len(arm.said) for arm in found), sorted({arm.tokens for arm in found})
        loss = sum(arm.loss for arm in found) / len(found)
        apart = sum(arm.divergence or 0.0 for arm in found) / len(found)
        least = f"{tokens[0]}" if len(tokens) == 1 else f"{tokens[0]} to {tokens[-1]}"
        print(f"| {name} | {least} | {sum(arm.right for arm in found)}/{asked} | {loss:.4f} | {apart:.4f} |")


if __name__ == "__main__":
    main()
