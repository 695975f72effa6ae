"""Training cartridges: a document distilled into fewer tokens than it has."""

from kvist.cartridge.train.conversations import Conversation, read_conversations, write_conversations
from kvist.cartridge.train.distil import Distillation
from kvist.cartridge.train.settings import TrainSettings
from kvist.cartridge.train.study import StudySettings, study
from kvist.cartridge.train.trainer import Trained, Trainer

__all__ = [
    "Conversation",
    "Distillation",
    "StudySettings",
    "TrainSettings",
    "Trained",
    "Trainer",
    "read_conversations",
    "study",
    "write_conversations",
]
