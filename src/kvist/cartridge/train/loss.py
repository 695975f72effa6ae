"""The loss of context distillation: how far the student's next ids are from those of the teacher, token by token.

Pure tensor arithmetic. Must not know models or data.
"""

from __future__ import annotations

import torch
from torch import Tensor


def divergence(student: Tensor, teacher: Tensor, top_k: int | None = None) -> Tensor:
    """Kullback-Leibler divergence of the student from the teacher at each token.

    Args:
        student: float32 logits, ``[tokens, vocabulary]``; the gradient goes here.
        teacher: of the same shape.
        top_k: sum over the teacher's so many likeliest ids alone, as where only these were kept; the rest of the
            probability is not made up for, so the minimum is the teacher's own distribution still, and values may be
            slightly negative. ``None``: all ids.

    Returns:
        Nats, ``[tokens]``. Each token counts alike, however many ids it is summed over.
    """
    wanted, given = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    if top_k is not None and top_k < wanted.shape[-1]:
        wanted, chosen = wanted.topk(top_k, -1)
        given = given.gather(-1, chosen)
    return (wanted.exp() * (wanted - given)).sum(-1)
