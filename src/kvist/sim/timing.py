"""How long a pass of an engine takes: prefill by new tokens, decode by the lengths of the sequences.

Times are whole nanoseconds, as in Dynamo's replay, so that sums do not depend on the order of adding. A decode pass
depends on the number of sequences and the sum of their lengths alone: of many passes in a row the times come as one
array, and the simulator jumps over them.
"""

from __future__ import annotations

import zipfile
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvist.errors import InvalidInput

Nanoseconds = NDArray[np.int64]

MAX_PASS_MS: Final = 1e7
"""No pass takes longer: three hours. Of such, int64 nanoseconds hold the sum of 900,000."""

SPEEDUPS: Final = (1e-6, 1e6)
"""Least and most."""


class Timing(ABC):
    """A model of one engine's passes, in milliseconds before any speed-up.

    A pass that does both takes the sum of both and `mixed_ms`.
    """

    @property
    def mixed_ms(self) -> float:
        """Added to passes that do both; below 0 where an engine pays the cost of a pass once."""
        return 0.0

    @abstractmethod
    def prefill_ms(self, tokens: int) -> float:
        """One pass over so many new prompt tokens; 0 tokens take no time."""

    @abstractmethod
    def decode_ms(self, batch: int, lengths: NDArray[np.int64], capacity: int) -> NDArray[np.float64]:
        """Passes that give each of ``batch`` sequences a token.

        Args:
            batch: sequences, 1 or more.
            lengths: sum of their lengths in each pass, in tokens, the token under way included.
            capacity: tokens that the pool holds.
        """


@dataclass(frozen=True, slots=True)
class Polynomial(Timing):
    """Dynamo's default: quadratic in new tokens, and quadratic in the part of the pool that the sequences fill.

    Attributes:
        prefill: coefficients in ms of the tokens' square, the tokens, and 1.
        decode: coefficients in ms of the filled part's square, the filled part, and 1.
        least_decode_ms: no decode pass is faster.
    """

    prefill: tuple[float, float, float] = (4.209989e-07, 1.518344e-02, 1.650142e01)
    decode: tuple[float, float, float] = (-25.74, 54.01, 5.74)
    least_decode_ms: float = 1.0

    def __post_init__(self) -> None:
        _require_times(self, "least_decode_ms")
        _require_coefficients("prefill", self.prefill)
        _require_coefficients("decode", self.decode, least=-MAX_PASS_MS)

    def prefill_ms(self, tokens: int) -> float:
        """See `Timing`."""
        if not tokens:
            return 0.0
        square, linear, constant = self.prefill
        return square * (float(tokens) * float(tokens)) + linear * tokens + constant

    def decode_ms(self, batch: int, lengths: NDArray[np.int64], capacity: int) -> NDArray[np.float64]:
        """See `Timing`."""
        square, linear, constant = self.decode
        filled = np.minimum(lengths / capacity, 1.0)
        return np.maximum(square * (filled * filled) + linear * filled + constant, self.least_decode_ms)


@dataclass(frozen=True, slots=True)
class Fixed(Timing):
    """Every pass with prompt tokens takes so long, and every decode pass so long."""

    prefill_each_ms: float = 10.0
    decode_each_ms: float = 10.0

    def __post_init__(self) -> None:
        _require_times(self, "prefill_each_ms", "decode_each_ms")

    def prefill_ms(self, tokens: int) -> float:
        """See `Timing`."""
        return self.prefill_each_ms if tokens else 0.0

    def decode_ms(self, batch: int, lengths: NDArray[np.int64], capacity: int) -> NDArray[np.float64]:
        """See `Timing`."""
        return np.full(len(lengths), self.decode_each_ms)


@dataclass(frozen=True, slots=True)
class Linear(Timing):
    """What `kvist sim fit` makes: prefill quadratic in new tokens, decode linear in sequences and their lengths.

    Attributes:
        prefill: coefficients in ms of the tokens' square, the tokens, and 1.
        decode: coefficients in ms of the sequences, the sum of their lengths, and 1.
        mixed: of `mixed_ms`, 0 or less, and no more than the other two constants together.
    """

    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]
    mixed: float = 0.0

    def __post_init__(self) -> None:
        _require_coefficients("prefill", self.prefill)
        _require_coefficients("decode", self.decode)
        if not -(self.prefill[2] + self.decode[2]) <= self.mixed <= 0:
            raise InvalidInput(f"mixed_ms must be 0 or less, no pass taking less than nothing; got {self.mixed!r}")

    @property
    def mixed_ms(self) -> float:
        """See `Timing`."""
        return self.mixed

    def prefill_ms(self, tokens: int) -> float:
        """See `Timing`."""
        square, linear, constant = self.prefill
        return square * (float(tokens) * float(tokens)) + linear * tokens + constant if tokens else 0.0

    def decode_ms(self, batch: int, lengths: NDArray[np.int64], capacity: int) -> NDArray[np.float64]:
        """See `Timing`."""
        each, token, constant = self.decode
        return np.asarray(each * batch + constant + token * lengths, dtype=np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Table(Timing):
    """Measured points with straight lines between them and beyond, in the form of Dynamo's npz profiles.

    Attributes:
        prefill_isl: new tokens, ascending; [n].
        prefill_ttft_ms: [n].
        decode_active_kv_tokens: sums of lengths, ascending; [a].
        decode_context_length: mean lengths, ascending; [c].
        decode_itl: ms; [a, c].
    """

    prefill_isl: NDArray[np.float64]
    prefill_ttft_ms: NDArray[np.float64]
    decode_active_kv_tokens: NDArray[np.float64]
    decode_context_length: NDArray[np.float64]
    decode_itl: NDArray[np.float64]

    def __post_init__(self) -> None:
        for name in ("prefill_isl", "decode_active_kv_tokens", "decode_context_length"):
            axis = getattr(self, name)
            if axis.ndim != 1 or len(axis) < 2 or not (np.isfinite(axis).all() and (np.diff(axis) > 0).all()):
                raise InvalidInput(f"{name} must be 2 or more ascending numbers; got shape {axis.shape}")
        wanted = {
            "prefill_ttft_ms": self.prefill_isl.shape,
            "decode_itl": (len(self.decode_active_kv_tokens), len(self.decode_context_length)),
        }
        for name, shape in wanted.items():
            values = getattr(self, name)
            if values.shape != shape or not np.isfinite(values).all():
                raise InvalidInput(f"{name} must be finite numbers of shape {shape}; got shape {values.shape}")

    def prefill_ms(self, tokens: int) -> float:
        """See `Timing`."""
        if not tokens:
            return 0.0
        i, part = _place(self.prefill_isl, np.array([float(tokens)]))
        low, high = self.prefill_ttft_ms[i], self.prefill_ttft_ms[i + 1]
        return max(0.0, float((low + (high - low) * part)[0]))

    def decode_ms(self, batch: int, lengths: NDArray[np.int64], capacity: int) -> NDArray[np.float64]:
        """See `Timing`."""
        i, across = _place(self.decode_active_kv_tokens, lengths.astype(np.float64))
        j, along = _place(self.decode_context_length, (lengths // batch).astype(np.float64))
        grid = self.decode_itl
        low = grid[i, j] + (grid[i, j + 1] - grid[i, j]) * along
        high = grid[i + 1, j] + (grid[i + 1, j + 1] - grid[i + 1, j]) * along
        return np.asarray(np.maximum(low + (high - low) * across, 1.0))


def _require_times(timing: Timing, *names: str) -> None:
    for name in names:
        value = getattr(timing, name)
        if not (isinstance(value, int | float) and 0 <= value <= MAX_PASS_MS):
            raise InvalidInput(f"{name} must be a number of ms, 0 to {MAX_PASS_MS:g}; got {value!r:.80}")


def _require_coefficients(name: str, values: tuple[float, ...], least: float = 0.0) -> None:
    if len(values) != 3 or not all(least <= value <= MAX_PASS_MS for value in values):
        raise InvalidInput(f"{name} must be 3 numbers, each {least:g} to {MAX_PASS_MS:g}; got {values!r:.80}")


_TABLE = ("prefill_isl", "prefill_ttft_ms", "decode_active_kv_tokens", "decode_context_length", "decode_itl")


class _TimingFile(msgspec.Struct, forbid_unknown_fields=True):
    format: Literal["kvist-timing-v1"]
    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]
    mixed_ms: float
    fit: msgspec.Raw = msgspec.Raw(b"null")  # where the numbers come from, for people


def load_timing(path: Path) -> Timing:
    """Read a model: JSON as `kvist sim fit` writes it, or an npz profile of Dynamo's.

    Raises:
        InvalidInput: the file can not be read, or is of neither form; the message names the key.
    """
    try:
        if path.suffix == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
                return Table(**{name: found[name].astype(np.float64) for name in _TABLE})
        read = msgspec.json.decode(path.read_bytes(), type=_TimingFile)
        return Linear(read.prefill, read.decode, read.mixed_ms)
    except KeyError as missing:
        wanted = ", ".join(_TABLE)
        raise InvalidInput(f"{path}: a profile has the arrays {wanted}; got none of the name {missing}") from None
    except (OSError, EOFError, ValueError, RecursionError, zipfile.BadZipFile, zlib.error, InvalidInput) as error:
        raise InvalidInput(f"{path}: {error}") from None


_KNOWN_LENGTHS: Final = 2**21
"""A `Clock` keeps the times of no longer sums of lengths than this: 16 MiB."""


class Clock:
    """A model's times as whole nanoseconds, for one pool.

    Args:
        timing: the model.
        capacity: tokens that the pool holds.
        speedup: all passes are so much faster.
        decode_speedup: decode passes are faster by this, too.

    Raises:
        InvalidInput: a pass takes longer than `MAX_PASS_MS`, here or when it is asked for.
    """

    def __init__(self, timing: Timing, capacity: int, *, speedup: float = 1.0, decode_speedup: float = 1.0) -> None:
        self._timing = timing
        self._capacity = capacity
        self._speedup = speedup
        self._decode_speedup = speedup * decode_speedup
        self._prefill: dict[int, int] = {}
        self.mixed_ns = round(timing.mixed_ms * 1e6 / speedup)
        # Dynamo's model and ours for tests depend on the sum of lengths alone, up to the pool's: every batch has the
        # same times. They are computed as far as they are asked for.
        self._is_by_length = isinstance(timing, Polynomial | Fixed)
        self._by_length: Nanoseconds = np.empty(0, dtype=np.int64)

    def prefill_ns(self, tokens: int) -> int:
        """One pass over so many new prompt tokens."""
        ns = self._prefill.get(tokens)
        if ns is None:
            ns = int(self._rounded(np.array([self._timing.prefill_ms(tokens)]), self._speedup)[0])
            self._prefill[tokens] = ns
        return ns

    def decode_ns(self, batch: int, length: int, passes: int) -> Nanoseconds:
        """So many passes in a row, the first over sequences with this sum of lengths; read-only.

        Args:
            batch: sequences, 1 or more; each grows by a token a pass.
            length: sum of their lengths in the first pass.
            passes: 1 or more.
        """
        end = length + batch * passes
        if not self._is_by_length:
            return self._decode(batch, np.arange(length, end, batch, dtype=np.int64))
        last = end - batch
        if last >= len(self._by_length):
            self._learn(last)
        if last < len(self._by_length):
            return self._by_length[length:end:batch]
        lengths = np.minimum(np.arange(length, end, batch, dtype=np.int64), self._capacity)
        return self._by_length[lengths] if len(self._by_length) > self._capacity else self._decode(1, lengths)

    def _learn(self, length: int) -> None:
        """Keep the times up to a sum of lengths, and of half as many again; none beyond the pool's or the most."""
        known, most = len(self._by_length), min(self._capacity + 1, _KNOWN_LENGTHS)
        wanted = min(max(length + 1, known + known // 2, 4096), most)
        if wanted > known:
            more = self._decode(1, np.arange(known, wanted, dtype=np.int64))
            self._by_length = np.concatenate((self._by_length, more))

    def _decode(self, batch: int, lengths: NDArray[np.int64]) -> Nanoseconds:
        ms = self._timing.decode_ms(batch, lengths, self._capacity)
        return self._rounded(ms, self._decode_speedup)

    @staticmethod
    def _rounded(ms: NDArray[np.float64], speedup: float) -> Nanoseconds:
        slowest = ms.max(initial=0.0)
        if not max(slowest, slowest / speedup) <= MAX_PASS_MS:  # or it is no number
            raise InvalidInput(
                f"timing: a pass must take at most {MAX_PASS_MS:g} ms; got {slowest:g} ms, at a speedup of {speedup:g}"
            )
        whole = _rounded(ms / 1e3)
        return whole if speedup == 1 else _rounded(whole / 1e9 / speedup)


def _rounded(seconds: NDArray[np.float64]) -> Nanoseconds:
    """The nearest nanosecond of each number of seconds, as Rust's ``Duration::from_secs_f64`` finds it.

    The product with 1e9 is rounded itself, which moves a time that lies close to a half; so the whole part is taken
    from the product, and what is left is computed in two parts that are exact (Dekker 1971).
    """
    product = seconds * 1e9
    high = seconds * 134217729.0
    high = high - (high - seconds)
    rest = (high * 1e9 - product) + (seconds - high) * 1e9
    whole = np.rint(product)
    off = (product - whole) + rest
    return (whole + (off > 0.5) - (off < -0.5)).astype(np.int64)


def _place(axis: NDArray[np.float64], at: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    i = np.clip(np.searchsorted(axis, at, side="right") - 1, 0, len(axis) - 2)
    return i, (at - axis[i]) / (axis[i + 1] - axis[i])
