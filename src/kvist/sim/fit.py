"""Fitting the time model to a real server: what its passes cost, from what was observed of them.

A pass over t new prompt tokens that also gives n sequences, of L tokens together, a token is taken to last, in ms:

    prefill: square t² + token t + constant      decode: sequence n + token L + constant      both: the sum, less an
                                                                                              overhead paid only once

That is linear in its coefficients. They are found by least squares, none below 0; what is far off the first solution
(a pass that compiled a kernel, a machine that slept) is left out of the second, and counted.
"""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvist.errors import InvalidInput
from kvist.sim.files import write_whole
from kvist.sim.observations import Floats, Observations

FORMAT: Final = "kvist-timing-v1"

_FAR: Final = 6 * 1.4826  # median absolute deviations that six standard deviations are
_LEAST_ROWS: Final = 8
_SIMPLEST_FIRST: Final = (2, 5, 1, 3, 4, 0, 6)
_ALIKE: Final = 1e-13
"""Of the sum of squares: a smaller gain is one of rounding."""
_GRID: Final = 33


class Part(NamedTuple):
    """How well one kind of rows is fitted, in ms."""

    name: str
    rows: int
    mean_ms: float
    median_off_ms: float
    p95_off_ms: float


@dataclass(frozen=True, slots=True)
class Fit:
    """A time model and how well it fits.

    Attributes:
        prefill: ms for the tokens' square, the tokens, and 1.
        decode: ms for the sequences, the sum of their lengths, and 1.
        mixed_ms: what a pass that does both takes beside their sum; 0 or less.
        kind: of the observations.
        rows: that were fitted.
        dropped: rows that were too far off to be.
        r2: share of their variance that the model explains.
        parts: prefill, decode, and both.
        seen: least and most new tokens, sequences and sums of lengths; beyond them the model is a guess.
    """

    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]
    mixed_ms: float
    kind: str
    rows: int
    dropped: int
    r2: float
    parts: tuple[Part, ...]
    seen: dict[str, tuple[float, float]]

    def document(self) -> dict[str, Any]:
        """What the JSON file holds."""
        found = asdict(self)
        model = {key: found.pop(key) for key in ("prefill", "decode", "mixed_ms")}
        return {"format": FORMAT, **model, "fit": found | {"parts": [part._asdict() for part in self.parts]}}

    def write(self, path: Path) -> None:
        """Write JSON, or, where the name ends in ``.npz``, a table in Dynamo's form, which has no `mixed_ms`.

        Raises:
            StoreError: it cannot be written.
        """
        data = self._table() if path.suffix == ".npz" else json.dumps(self.document(), indent=1).encode() + b"\n"
        write_whole(path, [data])

    def _table(self) -> bytes:
        tokens = np.linspace(0.0, max(self.seen["new_tokens"][1], 2.0), _GRID)
        longest = max(self.seen["lengths"][1], 2.0)
        lengths, context = np.linspace(0.0, longest, _GRID), np.geomspace(1.0, longest, _GRID)
        sequences = np.maximum(lengths[:, None] / context, 1.0)
        file = io.BytesIO()
        np.savez(
            file,
            prefill_isl=tokens,
            prefill_ttft_ms=np.polyval(self.prefill, tokens),
            decode_active_kv_tokens=lengths,
            decode_context_length=context,
            decode_itl=self.decode[0] * sequences + self.decode[1] * lengths[:, None] + self.decode[2],
        )
        return file.getvalue()


def fit(seen: Observations) -> Fit:
    """Find the coefficients.

    Raises:
        InvalidInput: there are too few rows, or none with prompt tokens, or none with decoding.
    """
    for column, what in ((2, "new prompt tokens"), (5, "decoding sequences")):
        rows = int(np.count_nonzero(seen.features[:, column]))
        if rows < _LEAST_ROWS:
            raise InvalidInput(f"the log must tell of {_LEAST_ROWS} passes with {what} or more; got {rows}")
    solution = _least_squares(seen.features, seen.ms)
    off = np.abs(seen.ms - seen.features @ solution)
    is_near = np.ones(len(off), dtype=bool)
    for at in _kinds(seen.features).values():
        is_near[at] = off[at] <= _FAR * np.median(off[at]) + 1e-6
    features, ms = seen.features[is_near], seen.ms[is_near]
    solution = _least_squares(features, ms)
    solution[6] = min(solution[6], solution[2] + solution[5])
    off = np.abs(ms - features @ solution)
    spread = float(((ms - ms.mean()) ** 2).sum())
    square, token, constant, sequence, length, base, once = (float(value) for value in solution)
    return Fit(
        prefill=(square, token, constant),
        decode=(sequence, length, base),
        mixed_ms=0.0 - once,
        kind=seen.kind,
        rows=len(ms),
        dropped=len(seen.ms) - len(ms),
        r2=1.0 - float((off**2).sum()) / spread if spread else 1.0,
        parts=tuple(
            Part(name, len(at), *(float(value) for value in (ms[at].mean(), *np.quantile(off[at], (0.5, 0.95)))))
            for name, at in _kinds(features).items()
        ),
        seen={
            name: (float(values.min()), float(values.max()))
            for name, column, what in (("new_tokens", 1, 2), ("sequences", 3, 5), ("lengths", 4, 5))
            if len(values := features[features[:, what] > 0, column])
        },
    )


def _kinds(features: Floats) -> dict[str, NDArray[np.intp]]:
    prefills, decodes = features[:, 2] > 0, features[:, 5] > 0
    kinds = {"prefill": prefills & ~decodes, "decode": decodes & ~prefills, "both": prefills & decodes}
    return {name: np.flatnonzero(rows) for name, rows in kinds.items() if rows.any()}


def _least_squares(features: Floats, ms: Floats) -> Floats:
    """The solution without a coefficient below 0: the best of those of all subsets of the columns.

    Where columns cannot be told apart (there was never more than one sequence), the simplest has it.
    """
    scale = np.sqrt((features**2).sum(axis=0))
    columns = np.array([column for column in _SIMPLEST_FIRST if scale[column]])
    scaled = features[:, columns] / scale[columns]
    gram, target = scaled.T @ scaled, scaled.T @ ms
    best, least, total = np.zeros(len(columns)), 0.0, float(ms @ ms)
    for size in range(1, len(columns) + 1):
        for subset in map(list, itertools.combinations(range(len(columns)), size)):
            found = np.linalg.lstsq(gram[np.ix_(subset, subset)], target[subset], rcond=1e-12)[0]
            error = float(found @ gram[np.ix_(subset, subset)] @ found - 2 * found @ target[subset])
            if (found >= 0).all() and error < least - _ALIKE * total:
                best, least = np.zeros(len(columns)), error
                best[subset] = found
    solution = np.zeros(features.shape[1])
    solution[columns] = best / scale[columns]
    return solution
