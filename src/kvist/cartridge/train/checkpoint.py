"""The state of a training run, in one safetensors file: a run that goes on from it is equal to one that never stopped.

Knows torch and safetensors. Must not know models or conversations.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvist.errors import InvalidInput

_KEY: Final = "kvist_training"


@dataclass(frozen=True, slots=True)
class Progressed:
    """Where a run stands.

    Attributes:
        losses: of every step done, float64, ``[steps]``.
        parameters: of the student.
        first, second: Adam's moments of each.
    """

    losses: Tensor
    parameters: Sequence[Tensor]
    first: Sequence[Tensor]
    second: Sequence[Tensor]

    @property
    def step(self) -> int:
        """Steps done."""
        return self.losses.shape[0]


def save(path: Path, state: Progressed, run: Mapping[str, Any]) -> None:
    """Write a checkpoint over the one before; a reader finds one or the other, whole.

    Args:
        path: of the file.
        state: as it stands; copied.
        run: what decides the run, JSON: `load` refuses another's checkpoint.
    """
    tensors = {"losses": state.losses}
    for name, parts in (("parameters", state.parameters), ("first", state.first), ("second", state.second)):
        tensors |= {f"{name}.{index}": part.detach().cpu().contiguous() for index, part in enumerate(parts)}
    partial = path.with_name(f".{path.name}.partial")
    save_file(tensors, partial, metadata={_KEY: json.dumps(run, sort_keys=True)})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def load(path: Path, run: Mapping[str, Any]) -> Progressed:
    """Read a checkpoint of the same run.

    Raises:
        InvalidInput: it cannot be read, or another run wrote it: what differs is named.
    """
    try:
        with safe_open(path, framework="pt") as file:
            written = json.loads((file.metadata() or {}).get(_KEY, "null"))
            names: list[str] = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError, ValueError) as error:
        raise InvalidInput(f"cannot read the checkpoint {str(path)!r}: {error}") from error
    if not isinstance(written, dict):
        raise InvalidInput(f"{str(path)!r} is no checkpoint of a training run")
    wanted = json.loads(json.dumps(run))
    differing = [name for name in sorted({*written, *wanted}) if written.get(name) != wanted.get(name)]
    if differing:
        pairs = ", ".join(f"{name}: {written.get(name)!r:.60} then, {wanted.get(name)!r:.60} now" for name in differing)
        raise InvalidInput(
            f"{str(path)!r} is of another run: {pairs}", hint="give the options of that run, or another --output"
        )
    count = sum(name.startswith("parameters.") for name in tensors)
    groups = [[tensors[f"{name}.{index}"] for index in range(count)] for name in ("parameters", "first", "second")]
    return Progressed(tensors["losses"], *groups)


def of_optimizer(optimizer: torch.optim.Adam, parameters: Sequence[Tensor], losses: Sequence[float]) -> Progressed:
    """The state of a run that has done at least one step."""
    moments = [optimizer.state[parameter] for parameter in parameters]
    return Progressed(
        torch.tensor(losses, dtype=torch.float64),
        parameters,
        [moment["exp_avg"] for moment in moments],
        [moment["exp_avg_sq"] for moment in moments],
    )


def into_optimizer(state: Progressed, optimizer: torch.optim.Adam, parameters: Sequence[Tensor]) -> None:
    """Put the state back: values into the parameters, moments into the optimizer."""
    with torch.no_grad():
        for index, parameter in enumerate(parameters):
            parameter.copy_(state.parameters[index])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(state.step)),
                "exp_avg": state.first[index].to(parameter.device, copy=True),
                "exp_avg_sq": state.second[index].to(parameter.device, copy=True),
            }
