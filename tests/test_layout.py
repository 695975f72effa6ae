import dataclasses
from typing import Any

import pytest

from kvist.errors import InvalidInput, LayoutMismatch
from kvist.layout import DTYPE_BYTES, Layout

LAYOUT = Layout(page_size_tokens=16, n_layers=80, n_heads=64, head_dim=128, dtype="bf16")


def test_page_bytes() -> None:
    assert LAYOUT.page_bytes == 80 * 16 * 64 * 128 * 2 == 20 << 20
    assert DTYPE_BYTES == {"bf16": 2, "f16": 2, "f32": 4, "fp8e4m3": 1}
    for dtype, size in DTYPE_BYTES.items():
        assert dataclasses.replace(LAYOUT, dtype=dtype).page_bytes == 80 * 16 * 64 * 128 * size
    assert dataclasses.replace(LAYOUT, n_layers=0, n_heads=0, head_dim=0).page_bytes == 0


CHANGES: list[dict[str, Any]] = [
    {"page_size_tokens": 32}, {"n_layers": 1}, {"n_heads": 8}, {"head_dim": 64}, {"dtype": "f16"}, {"model": "m"},
    {"revision": "r"}, {"memory_order": "LHND"}, {"tp_size": 2}, {"tp_size": 2, "tp_rank": 1},
]  # fmt: skip


def test_every_field_is_in_the_fingerprint() -> None:
    prints = {dataclasses.replace(LAYOUT, **change).fingerprint for change in CHANGES}
    assert len(prints | {LAYOUT.fingerprint}) == len(CHANGES) + 1
    assert LAYOUT.fingerprint.startswith("sha256:") and len(LAYOUT.fingerprint) == 71


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_difference_is_refused_with_both_values(change: dict[str, Any]) -> None:
    other = dataclasses.replace(LAYOUT, **change)
    with pytest.raises(LayoutMismatch) as caught:
        LAYOUT.require(other, of="the snapshot", into="the engine")
    for name, value in change.items():
        assert f"{name} {value!r} there, {getattr(LAYOUT, name)!r} here" in str(caught.value)
    LAYOUT.require(dataclasses.replace(LAYOUT), of="x", into="y")


@pytest.mark.parametrize(
    "change",
    [{"page_size_tokens": 0}, {"n_layers": -1}, {"n_heads": 2**32}, {"head_dim": 1.0}, {"n_layers": True},
     {"n_layers": None}, {"dtype": "int8"}, {"dtype": None}, {"memory_order": "NLHD"}, {"tp_rank": 1},
     {"tp_rank": -1}, {"tp_size": 0}, {"model": 5}, {"revision": b"x"}],
)  # fmt: skip
def test_refuses(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(change))):
        dataclasses.replace(LAYOUT, **change)
