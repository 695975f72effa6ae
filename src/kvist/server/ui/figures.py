"""Numbers as people read them: at most four digits and a unit. Pure."""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime
from typing import Final

_BINARY: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_AGES: Final = ((365 * 86400, "y"), (86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def nbytes(count: float) -> str:
    """``"0 B"``, ``"1.50 KiB"``, ``"12.3 MiB"``, ``"1023 GiB"``."""
    size, unit = float(count), 0
    while abs(size) >= 1023.5 and unit < len(_BINARY) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.0f} B" if not unit else f"{_three(size)} {_BINARY[unit]}"


def count(number: float) -> str:
    """``"1,234"``."""
    return f"{number:,.0f}"


def percent(part: float) -> str:
    """``"0%"``, ``"0.4%"``, ``"37%"``, ``"99.9%"``, ``"100%"``: not rounded to none or all, where it is neither."""
    value = 100 * part
    if value in (0.0, 100.0):
        return f"{value:.0f}%"
    if value < 1 or value > 99:
        return f"{min(max(value, 0.1), 99.9):.1f}%"
    return f"{value:.0f}%"


def times(ratio: float) -> str:
    """``"1.00×"``, ``"12.3×"``."""
    return f"{_three(ratio)}×"


def seconds(span: float) -> str:
    """``"0.42 ms"``, ``"35.0 ms"``, ``"1.20 s"``, ``"3 min 5 s"``."""
    if span < 1:
        return f"{_three(1e3 * span)} ms"
    if span < 60:
        return f"{_three(span)} s"
    whole = round(span)
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def ago(age_s: float) -> str:
    """``"just now"``, ``"12 s ago"``, ``"3 h ago"``; a time to come (another machine's clock) is now."""
    for size, unit in _AGES:
        if age_s >= size:
            return f"{age_s // size:.0f} {unit} ago"
    return "just now"


def since(created_ns: int) -> str:
    """How long ago a moment was; see `ago`."""
    return ago(time.time() - created_ns / 1e9)


def moment(created_ns: int) -> str:
    """``"2026-11-21 17:05:12 UTC"``; a time that no calendar has is told in seconds since 1970."""
    try:
        return datetime.fromtimestamp(created_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return f"{created_ns / 1e9:.0f} s since 1970"


def _three(value: float) -> str:
    """Three digits that tell something."""
    if not math.isfinite(value) or value == 0:
        return f"{value:.0f}"
    digits = max(0, min(2, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:.{digits}f}"
