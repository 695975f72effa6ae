import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.errors import InvalidInput, LayoutMismatch
from kvist.layout import DTYPE_BYTES, OPTIONAL, Layout

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
    {"memory_order": "vllm-cpu-0.32"}, {"attention": "mla"}, {"attention": "sliding:128"}, {"attention": "sliding:1"},
    {"n_groups": 2}, {"n_groups": 2, "group": 1},
]  # fmt: skip


def test_fingerprints_from_before_there_were_optional_fields_still_hold() -> None:
    assert LAYOUT.fingerprint == "sha256:05aa27a9fb58141e2a7fcd916738468810daf36a6fab8fa8fac66babd3182354"
    rank = Layout(
        page_size_tokens=4, n_layers=2, n_heads=1, head_dim=8, dtype="f16", model="org/tiny", revision="r1",
        memory_order="LHND", tp_rank=1, tp_size=2,
    )  # fmt: skip
    assert rank.fingerprint == "sha256:9f307b32804cfdaf99d325a31d98e1577f422a8ca943b2a82eae048791797f7b"
    assert rank.uncommon == {}
    assert dataclasses.replace(rank, group=1, n_groups=2).uncommon == {"group": 1, "n_groups": 2}


def test_optional_fields_are_those_with_these_defaults() -> None:
    assert {name: getattr(LAYOUT, name) for name in OPTIONAL} == OPTIONAL


def test_sliding_window() -> None:
    for attention, window in (("full", 0), ("mla", 0), ("sliding:1", 1), (f"sliding:{2**32 - 1}", 2**32 - 1)):
        assert dataclasses.replace(LAYOUT, attention=attention).sliding_window == window


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
     {"tp_rank": -1}, {"tp_size": 0}, {"model": 5}, {"revision": b"x"}, {"memory_order": None},
     {"memory_order": ["LNHD"]}, {"memory_order": "vllm-"}, {"memory_order": "vllm-NHD"}, {"memory_order": "vllm-a\n"},
     {"attention": None}, {"attention": "sliding"}, {"attention": "sliding:"}, {"attention": "sliding:0"},
     {"attention": "sliding:-1"}, {"attention": "sliding:01"}, {"attention": "sliding:1\n"},
     {"attention": "sliding:\u0661"}, {"attention": f"sliding:{2**32}"}, {"attention": "FULL"}, {"group": 1},
     {"group": -1}, {"group": True}, {"group": "0"}, {"n_groups": 0}, {"n_groups": 2.0}],
)  # fmt: skip
def test_refuses(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(change))):
        dataclasses.replace(LAYOUT, **change)


layouts = st.builds(
    Layout,
    page_size_tokens=st.integers(1, 2**32 - 1),
    n_layers=st.integers(0, 2**32 - 1),
    n_heads=st.integers(0, 64),
    head_dim=st.integers(0, 512),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    model=st.none() | st.just("org/m"),
    revision=st.none() | st.just("r"),
    memory_order=st.sampled_from(["LNHD", "LHND"]) | st.from_regex(r"vllm-[a-z0-9.-]{1,20}", fullmatch=True),
    tp_rank=st.integers(0, 3),
    tp_size=st.integers(4, 8),
    attention=st.sampled_from(["full", "mla"]) | st.integers(1, 2**32 - 1).map("sliding:{}".format),
    group=st.integers(0, 3),
    n_groups=st.integers(4, 8),
)


@given(layouts)
def test_from_dict_undoes_asdict(layout: Layout) -> None:
    assert Layout.from_dict(json.loads(json.dumps(dataclasses.asdict(layout)))) == layout


def test_from_dict_fills_in_defaults_and_is_strict() -> None:
    needed = {"page_size_tokens": 16, "n_layers": 80, "n_heads": 64, "head_dim": 128, "dtype": "bf16"}
    assert Layout.from_dict(needed) == LAYOUT
    for name in needed:
        with pytest.raises(InvalidInput, match=f"needs the fields {name} too"):
            Layout.from_dict({key: value for key, value in needed.items() if key != name})
    wrong: list[Any] = [{**needed, "fingerprint": "x"}, {**needed, 1: 2}, [], None, "layout", [*needed.items()]]
    for fields in wrong:
        with pytest.raises(InvalidInput, match=r"no fields|must be a mapping"):
            Layout.from_dict(fields)
    with pytest.raises(InvalidInput, match="group"):
        Layout.from_dict({**needed, "group": 1})
