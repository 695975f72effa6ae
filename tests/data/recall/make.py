"""Make the model in this directory: a small Llama that answers questions about a document in its context.

The task is `kvist.testing.recall`. Documents of the training run have seeds from 10^9 on, so those with small seeds
are held out. It learns to repeat what it saw before first, then to look facts up in short documents, then in long ones:
ten minutes on one core. The same arguments give the same weights on one machine and version of torch.

    python tests/data/recall/make.py [--output DIR] [--steps N]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from kvist.testing.recall import BOS_ID, END_ID, EOS_ID, FORMS, draw_document, make_tokenizer

FIRST_SEED = 10**9
MOST_FACTS = 40
QUESTIONS = 12
SCHEDULE = 1600
"""Steps over which the rate falls; the last of them change nothing any more, and are not done."""

WORDS = 7
"""The first id that is a word; below are special tokens."""


def make_config(vocab: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.08,
        bos_token_id=BOS_ID,
        eos_token_id=END_ID,
        pad_token_id=0,
        dtype="float32",
    )


def draw_repetition(vocab: int, generator: random.Random, rows: int) -> tuple[Any, Any]:
    """Words in random order, twice; the second time is to be learnt."""
    length = generator.randint(8, 40)
    halves = [generator.sample(range(WORDS, vocab), length) for _ in range(rows)]
    ids = torch.tensor([[BOS_ID, *half, *half] for half in halves])
    labels = ids.clone()
    labels[:, : length + 1] = -100
    return ids, labels


def draw_batch(tokenizer: Tokenizer, generator: random.Random, facts: int, rows: int) -> tuple[Any, Any]:
    """Conversations about as many documents, and their labels: -100 where nothing is to be learnt.

    Half of the batches have the document as a system message, half as bare text. Some of its facts come again before
    the questions: that is the step from repeating to answering.
    """
    system, ids, labels = generator.random() < 0.5, [], []
    forms = [generator.choice(FORMS) for _ in range(QUESTIONS)]  # the same in each row: no padding
    again = generator.choice((0, 0, 4))
    for _ in range(rows):
        document = draw_document(facts, seed=generator.randrange(FIRST_SEED, 2**62))
        text = f"<|system|> {document.text} <|end|>" if system else document.text
        row = tokenizer.encode(f"<|bos|> {text}", add_special_tokens=False).ids
        wanted = [-100] * len(row)
        asked = generator.sample(list(document.facts), min(facts, QUESTIONS))
        repeated = generator.sample(list(document.facts), min(facts, again))
        turns = [(f"now {name} keeps the", name, "") for name in repeated]
        turns += [
            (f"<|user|> {form.format(name=name)} <|assistant|>", name, "<|end|>")
            for form, name in zip(forms, asked, strict=False)
        ]
        for prompt, name, end in turns:
            given = tokenizer.encode(prompt, add_special_tokens=False).ids
            answer = tokenizer.encode(f"{document.facts[name]} {end}", add_special_tokens=False).ids
            row += given + answer
            wanted += [-100] * len(given) + answer
        ids.append(row)
        labels.append(wanted)
    return torch.tensor(ids), torch.tensor(labels)


def share_right(model: Any, ids: Any, labels: Any) -> float:
    """Of the words that are to be learnt, the share that the model says."""
    with torch.inference_mode():
        guess = model(input_ids=ids).logits[:, :-1].argmax(-1)
    learnt = labels[:, 1:] >= WORDS
    return float((guess == labels[:, 1:])[learnt].float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--steps", type=int, default=1381)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--rows", type=int, default=24)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    directory = make_tokenizer(arguments.output)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    model = LlamaForCausalLM(make_config(tokenizer.get_vocab_size()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.rate, betas=(0.9, 0.98), weight_decay=0.01)
    generator, begun, most = random.Random(0), time.monotonic(), 0

    def draw() -> tuple[Any, Any]:
        if most == 0:
            return draw_repetition(tokenizer.get_vocab_size(), generator, 32)
        return draw_batch(tokenizer, generator, generator.randint(2, most), arguments.rows)

    for step in range(arguments.steps):
        falling = math.cos(math.pi / 2 * max(0.0, step / SCHEDULE - 0.5) * 2)
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate * min(1.0, (step + 1) / 100) * falling
        ids, labels = draw()
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            right = sum(share_right(model, *draw()) for _ in range(4)) / 4
            took = time.monotonic() - begun
            print(f"{step + 1} facts {most} loss {loss.item():.4f} right {right:.3f} {took:.0f} s", file=sys.stderr)
            if right > 0.9:  # what is short is learnt sooner
                most = min(MOST_FACTS, max(4, most + most // 2))
    model.save_pretrained(directory)
    settings = json.loads((directory / "generation_config.json").read_text())
    settings["eos_token_id"] = [END_ID, EOS_ID]
    (directory / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    main()
