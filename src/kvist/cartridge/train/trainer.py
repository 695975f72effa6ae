"""Context distillation: a short prefix learns to make the model say what it says with the whole document in view.

Teacher and student are one frozen model. The teacher has the keys and values of the document in front of a
conversation, the student those that are trained; the loss is how far their next ids are apart, at each id of the
completions. (Eyuboglu et al., "Cartridges", arXiv 2506.06266.)

Knows models and conversations. Must not know a cartridge's files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvist.cartridge.causal import CausalModel, Layers, Progress
from kvist.cartridge.train import checkpoint
from kvist.cartridge.train.conversations import Example, draw_order, pad
from kvist.cartridge.train.loss import divergence
from kvist.cartridge.train.settings import TrainSettings
from kvist.cartridge.train.student import Student, start_of
from kvist.errors import EngineError, InvalidInput


@dataclass(frozen=True, slots=True)
class Trained:
    """What came of a run.

    Attributes:
        layers: in the model's data type, on its device.
        losses: nats per token, of every step.
    """

    layers: Layers
    losses: list[float]


class Trainer:
    """One run. The same arguments give the same bits on one machine, however often the run was stopped and resumed."""

    def __init__(
        self, model: CausalModel, document: Sequence[int], examples: Sequence[Example], settings: TrainSettings
    ) -> None:
        """Compute the teacher's prefix and the student's first one.

        Args:
            model: on its device.
            document: ids.
            examples: at least one.
            settings: of the run.

        Raises:
            InvalidInput: nothing to learn from, or more tokens than the document has.
        """
        if not examples:
            raise InvalidInput("expected at least one conversation to train on, got none")
        self._model, self._examples, self._settings = model, examples, settings
        self._document = tuple(document)
        self._teacher = model.prefill(document)
        initial = start_of(model, document, settings.tokens, settings.start, settings.seed)
        self._student = Student(initial, settings.frozen_tokens)
        self._optimizer = torch.optim.Adam(self._student.parameters, lr=settings.rate)
        self._losses: list[float] = []

    def run(self, *, saves: Path | None = None, every: int = 50, progress: Progress | None = None) -> Trained:
        """Train to the end, from the checkpoint on where there is one.

        Args:
            saves: file of the checkpoint; ``None``: none is read or written.
            every: steps from one to the next.
            progress: is told of every step.

        Raises:
            InvalidInput: the checkpoint is another run's.
            EngineError: the loss is no number.
        """
        if saves is not None and saves.is_file():
            state = checkpoint.load(saves, self.describe())
            checkpoint.into_optimizer(state, self._optimizer, self._student.parameters)
            self._losses = state.losses.tolist()
        while len(self._losses) < self._settings.steps:
            self._losses.append(self._step(len(self._losses)))
            done = len(self._losses)
            if saves is not None and (done % every == 0 or done == self._settings.steps):
                self.save(saves)
            if progress is not None:
                progress(done, self._settings.steps)
        layers = [(keys.detach(), values.detach()) for keys, values in self._student.layers(self._model.dtype)]
        return Trained(layers, list(self._losses))

    def save(self, path: Path) -> None:
        """Write the checkpoint now; at least one step is done."""
        state = checkpoint.of_optimizer(self._optimizer, self._student.parameters, self._losses)
        checkpoint.save(path, state, self.describe())

    def describe(self) -> dict[str, Any]:
        """What decides the run; JSON."""
        examples = json.dumps([(one.ids, one.start) for one in self._examples])
        return self._settings.document() | {
            "model": self._model.identity.revision,
            "dtype": self._model.identity.dtype,
            "document": hashlib.sha256(json.dumps(self._document).encode()).hexdigest(),
            "conversations": hashlib.sha256(examples.encode()).hexdigest(),
        }

    def _step(self, step: int) -> float:
        settings = self._settings
        chosen = [self._examples[i] for i in draw_order(len(self._examples), settings.batch, step, settings.seed)]
        chosen.sort(key=lambda one: len(one.ids))  # rows of one pass are padded to the longest
        learnt = sum(one.learnt for one in chosen)
        self._optimizer.zero_grad()
        loss = 0.0
        for start in range(0, len(chosen), settings.rows):
            total = self._total(chosen[start : start + settings.rows]) / learnt
            total.backward()  # type: ignore[no-untyped-call]
            loss += total.item()
        if not math.isfinite(loss):
            raise EngineError(f"the loss of step {step + 1} is {loss}", hint="train with a lower --rate")
        for group in self._optimizer.param_groups:
            group["lr"] = settings.rate_at(step)
        self._optimizer.step()
        return loss

    def _total(self, examples: Sequence[Example]) -> torch.Tensor:
        """The divergence, summed over the tokens of one forward pass."""
        rows = pad(examples)
        keep = rows.predicts.any(0).nonzero().flatten()
        counts = rows.predicts[:, keep].to(self._model.device)
        with torch.no_grad():
            wanted = self._model.logits(rows.ids, self._teacher, keep=keep)[counts]
        given = self._model.logits(rows.ids, self._student.layers(self._model.dtype), keep=keep)[counts]
        return divergence(given, wanted, self._settings.top_k).sum()
