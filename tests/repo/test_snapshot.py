import dataclasses
import json
from typing import Any

import pytest

from kvist.errors import InvalidInput, InvalidManifest
from kvist.hashing import sha256_cid
from kvist.repo import Snapshot
from kvist.repo.manifest import canonical_json
from kvist.repo.snapshot import MESSAGE_MAX

A, B = ("sha256:" + c * 64 for c in "ab")
ONE = Snapshot((A,), (B,), 5, "näme", "message", 7, "n")


def test_reads_back() -> None:
    for each in (ONE, Snapshot((A,)), Snapshot((A, B), (A, B), name=None)):
        assert Snapshot.decode(each.encode()) == each
        assert each.cid == sha256_cid(each.encode())


def test_every_field_is_part_of_its_identity() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"manifests": (B,)},
        {"parents": ()},
        {"tokens": 6},
        {"name": None},
        {"message": ""},
        {"created_ns": 8},
        {"nonce": ""},
    ]
    assert len({dataclasses.replace(ONE, **change).cid for change in changes}) == len(changes)


@pytest.mark.parametrize(
    "change",
    [
        {"manifests": ()}, {"manifests": ("x",)}, {"manifests": ("blake3:" + "a" * 64,)}, {"parents": (A, A)},
        {"parents": (A.upper(),)}, {"tokens": -1}, {"tokens": True}, {"tokens": 2**63}, {"created_ns": 1.5},
        {"name": 0}, {"name": False}, {"message": None}, {"message": "x" * (MESSAGE_MAX + 1)}, {"message": "\ud800"},
        {"name": "\udfff"}, {"nonce": 3},
    ],
)  # fmt: skip
def test_refuses(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        dataclasses.replace(ONE, **change)
    document = json.loads(ONE.encode()) | {k: list(v) if isinstance(v, tuple) else v for k, v in change.items()}
    with pytest.raises(InvalidManifest):
        Snapshot.decode(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())


def test_refuses_what_is_not_canonical_or_not_a_snapshot() -> None:
    document = json.loads(ONE.encode())
    for other in (
        b"", b"{}", b"[]", b"\xff", ONE.encode() + b"\n", ONE.encode()[:-1],
        json.dumps(document).encode(),
        canonical_json(document | {"extra": 1}),
        canonical_json(document | {"kind": "x"}),
        canonical_json(document | {"version": 2}),
        canonical_json(document | {"version": True}),
        canonical_json(document | {"parents": "x"}),
        canonical_json(document | {"parents": [[]]}),
        canonical_json({k: v for k, v in document.items() if k != "nonce"}),
        json.dumps(document | {"message": "\ud800"}, sort_keys=True, separators=(",", ":")).encode(),
    ):  # fmt: skip
        with pytest.raises(InvalidManifest):
            Snapshot.decode(other)


def test_one_flipped_bit_is_refused_or_another_snapshot() -> None:
    data = ONE.encode()
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert Snapshot.decode(bytes(damaged)).cid != ONE.cid
        except InvalidManifest:
            continue
