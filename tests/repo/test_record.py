import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.errors import InvalidManifest
from kvist.repo import record
from kvist.repo.manifest import canonical_json

TEXT = st.text('ac"\\é\U0001f300', max_size=4)
VALUES = st.none() | st.booleans() | st.integers() | TEXT | st.lists(TEXT, max_size=2)
DOCUMENTS = st.dictionaries(TEXT.filter(lambda key: key != record.CHECK), VALUES, max_size=3)


@settings(max_examples=40)
@given(TEXT, DOCUMENTS)
def test_reads_back(key: str, document: dict[str, object]) -> None:
    assert record.decode(key, record.encode(key, document)) == document


@settings(max_examples=40)
@given(TEXT, DOCUMENTS, st.data())
def test_any_flipped_bit_is_found(key: str, document: dict[str, object], data: st.DataObject) -> None:
    damaged = bytearray(record.encode(key, document))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(InvalidManifest):
        record.decode(key, bytes(damaged))


@settings(max_examples=40)
@given(TEXT, TEXT, DOCUMENTS)
def test_belongs_to_its_key(key: str, other: str, document: dict[str, object]) -> None:
    if key != other:
        with pytest.raises(InvalidManifest, match="changed, or is another's"):
            record.decode(other, record.encode(key, document))


def test_one_without_its_check_is_refused() -> None:
    for data in (canonical_json({"b": 1, "a": None}), b'{"a": 1}', b"", b"[]", b'{"a":1}x', b'{"check":null}'):
        with pytest.raises(InvalidManifest):
            record.decode("k", data)
