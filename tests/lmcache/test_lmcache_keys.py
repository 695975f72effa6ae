"""Keys: no two of LMCache's become one of ours, and tags say what they say or are refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from no_lmcache import Key, LayerKey

from kvist.engines.lmcache.keys import CartridgeTags, block_of, cartridge_of


def tagged(*tags: tuple[str, Any]) -> Key:
    return Key(tags=tags)


def test_a_key_without_tags_names_no_cartridge() -> None:
    assert cartridge_of(Key()) is None
    assert cartridge_of(tagged()) is None
    assert cartridge_of(tagged(("tenant", "a"))) is None


def test_a_cartridge_and_perhaps_a_layer() -> None:
    assert cartridge_of(tagged(("cartridge", "doc"))) == CartridgeTags("doc")
    assert cartridge_of(tagged(("tenant", "a"), ("cartridge", 42))) == CartridgeTags("42")
    assert cartridge_of(tagged(("layer", "3"), ("cartridge", "doc"))) == CartridgeTags("doc", 3)
    assert cartridge_of(tagged(("cartridge", "doc"), ("layer", 0))) == CartridgeTags("doc", 0)


@pytest.mark.parametrize("layer", ["", "x", "-1", "1.0", "²", 1.0, True])
def test_a_layer_that_is_no_number(layer: object) -> None:
    with pytest.raises(ValueError, match="no layer"):
        cartridge_of(tagged(("cartridge", "doc"), ("layer", layer)))


def test_a_layer_of_nothing_and_a_cartridge_without_a_name() -> None:
    with pytest.raises(ValueError, match="of no use"):
        cartridge_of(tagged(("layer", "0")))
    with pytest.raises(ValueError, match="is empty"):
        cartridge_of(tagged(("cartridge", "")))


texts = st.text(alphabet="ab@%01", max_size=4)
keys = st.builds(
    Key,
    chunk_hash=st.one_of(st.integers(-300, 300), st.binary(max_size=2)),
    tags=st.one_of(st.none(), st.lists(st.tuples(texts, texts), max_size=2).map(tuple)),
    model_name=texts,
    world_size=st.integers(1, 3),
    worker_id=st.integers(0, 2),
    dtype=st.sampled_from(["a", "b"]),
)


@given(keys, keys, st.booleans(), st.booleans(), st.sampled_from(["", "x"]), st.sampled_from(["", "x"]))
def test_different_keys_have_different_blocks(
    one: Key, other: Key, full: bool, other_full: bool, identity: str, other_identity: str
) -> None:
    def content(key: Key, *rest: Any) -> Any:  # no tags and empty tags are the same
        return (*dataclasses.astuple(dataclasses.replace(key, tags=key.tags or ())), type(key.chunk_hash), *rest)

    same = content(one, full, identity) == content(other, other_full, other_identity)
    blocks = {
        block_of(one, is_full=full, identity=identity),
        block_of(other, is_full=other_full, identity=other_identity),
    }
    assert len(blocks) == (1 if same else 2)


def test_each_layer_has_a_block_of_its_own() -> None:
    made = [Key(), LayerKey(), LayerKey(layer_id=1)]
    assert len({block_of(key) for key in made}) == 3
    assert all(len(block_of(key)) == 64 for key in made)
