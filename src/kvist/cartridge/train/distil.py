"""From a document and conversations about it to a trained cartridge: framing, training, and what its manifest says.

Knows all of this package. Must not know the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from kvist.cartridge.build import describe, template_hash
from kvist.cartridge.cartridge import Cartridge
from kvist.cartridge.causal import CausalModel, Progress
from kvist.cartridge.framing import Framing
from kvist.cartridge.train.conversations import Conversation, make_example
from kvist.cartridge.train.settings import TrainSettings
from kvist.cartridge.train.study import answer
from kvist.cartridge.train.trainer import Trained, Trainer
from kvist.errors import InvalidInput


class Distillation:
    """A document, ready to be distilled into cartridges of any length."""

    def __init__(
        self,
        model: CausalModel,
        framing: Framing,
        text: str,
        conversations: Sequence[Conversation],
        *,
        answer_tokens: int = 256,
    ) -> None:
        """Frame everything, and let the model answer what has no completion yet.

        Args:
            model: teacher and student.
            framing: of document and conversations, and later of requests.
            text: the document.
            conversations: about it.
            answer_tokens: most of an answer that the model gives here.

        Raises:
            InvalidInput: the document, or a conversation after it, has no room in the model; or there is none.
        """
        self.model, self.framing, self.text = model, framing, text
        self.document = framing.document(text)
        room = None if model.max_positions is None else model.max_positions - len(self.document)
        if not conversations or (room is not None and room < 1):
            raise InvalidInput(
                f"expected conversations, and room for them after {len(self.document)} tokens; got "
                f"{len(conversations)}, and {model.max_positions} positions"
            )
        if any(one.completion is None for one in conversations):
            conversations = answer(model, framing, model.prefill(self.document), conversations, answer_tokens)
        self.examples = [make_example(one, framing, model.end, room) for one in conversations]

    def train(
        self,
        settings: TrainSettings,
        *,
        saves: Path | None = None,
        every: int = 50,
        progress: Progress | None = None,
    ) -> Trained:
        """Train; see `Trainer.run`."""
        return Trainer(self.model, self.document, self.examples, settings).run(
            saves=saves, every=every, progress=progress
        )

    def package(
        self,
        trained: Trained,
        settings: TrainSettings,
        *,
        cartridge_id: str,
        source_document: str = "",
        labels: Mapping[str, str] | None = None,
        license: str = "",
    ) -> Cartridge:
        """The cartridge of a run. It has no token ids: its keys and values are no text's.

        Args:
            trained: came of ``settings``.
            settings: of the run.
            cartridge_id: see `Cartridge.create`; so are the others.
        """
        last = trained.losses[-20:]
        provenance = describe(self.model, self.framing, self.text) | {
            "method": "context distillation",
            "settings": settings.document(),
            "document_tokens": len(self.document),
            "conversations": len(self.examples),
            "first_loss": trained.losses[0],
            "last_loss": sum(last) / len(last),
        }
        return Cartridge.create(
            trained.layers,
            self.model.identity,
            cartridge_id=cartridge_id,
            num_frozen_tokens=settings.frozen_tokens,
            training_steps=len(trained.losses),
            source_document=source_document,
            labels=labels,
            provenance=provenance,
            license=license,
            chat_template_hash=template_hash(self.framing),
        )
