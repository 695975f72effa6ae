"""From what a request says to the id of its cartridge."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.cartridge.routing import (
    CartridgeRouter,
    CompositeRouter,
    ExplicitCartridgeRouter,
    LabelCartridgeRouter,
    Selection,
    StaticCartridgeRouter,
    build_router_from_config,
)
from kvist.errors import InvalidInput, UnknownCartridge

NOTHING = Selection()


class Labels:
    """Cartridges by one label each."""

    def __init__(self, **labels: tuple[str, str]) -> None:
        self.labels = labels

    def ids_by_label(self, key: str, value: str) -> list[str]:
        return [name for name, label in self.labels.items() if label == (key, value)]


LABELS = Labels(law=("area", "law"), tax=("area", "tax"), law2=("area", "law"))


def params(**told: Any) -> Selection:
    return Selection(kv_transfer_params=told)


def extra(**told: Any) -> Selection:
    return Selection(extra_args=told)


# -- what a request says -----------------------------------------------------------------------------------------


def test_the_three_places_in_their_order() -> None:
    nested = {"kv_transfer_params": {"cartridge_id": "nested"}}
    assert Selection({"cartridge_id": "top"}, {"cartridge_id": "extra"} | nested).value("cartridge_id") == "top"
    assert Selection({}, {"cartridge_id": "extra"} | nested).value("cartridge_id") == "extra"
    assert Selection(None, nested).value("cartridge_id") == "nested"
    assert Selection({"cartridge_id": None}, nested).value("cartridge_id") == "nested"
    assert Selection({"other": "x"}, {"kv_transfer_params": None}).value("cartridge_id") is None


def test_a_whole_number_is_its_digits() -> None:
    assert params(cartridge_id=42).value("cartridge_id") == "42"
    assert params(cartridge_id="").value("cartridge_id") == ""


@pytest.mark.parametrize("odd", [True, 1.5, ["a"], {"a": 1}, b"a"])
def test_another_type_is_refused_and_not_made_text(odd: object) -> None:
    with pytest.raises(InvalidInput, match="cartridge_id"):
        params(cartridge_id=odd).value("cartridge_id")


# -- explicit ----------------------------------------------------------------------------------------------------


def test_explicit() -> None:
    router = ExplicitCartridgeRouter()
    assert router.resolve(params(cartridge_id="a")) == "a"
    assert router.resolve(extra(cartridge_id="a")) == "a"
    assert router.resolve(extra(kv_transfer_params={"cartridge_id": "a"})) == "a"
    assert router.resolve(params(cartridge_id=42)) == "42"
    assert router.resolve(params(other="a")) is None
    assert router.resolve(NOTHING) is None


def test_explicit_by_another_key() -> None:
    router = ExplicitCartridgeRouter("document")
    assert router.resolve(params(document="a", cartridge_id="b")) == "a"
    assert router.resolve(params(cartridge_id="b")) is None


def test_who_names_one_gets_no_other() -> None:
    static = StaticCartridgeRouter("a")
    assert static.choose(NOTHING) == static.choose(params(cartridge_id="a")) == "a"
    with pytest.raises(InvalidInput, match="expected 'a', got 'b'"):
        static.choose(params(cartridge_id="b"))
    with pytest.raises(InvalidInput, match="expected None, got 'b'"):
        ExplicitCartridgeRouter("document").choose(params(cartridge_id="b"))
    assert ExplicitCartridgeRouter().choose(params(cartridge_id="b")) == "b"


# -- static ------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none()))
def test_static_is_always_the_same(told: dict[str, Any]) -> None:
    router = StaticCartridgeRouter("a")
    assert router.resolve(Selection(told, told)) == "a"
    assert router.resolve(NOTHING) == "a"


# -- label -------------------------------------------------------------------------------------------------------


def test_label_is_the_first_registered_of_those_that_carry_it() -> None:
    router = LabelCartridgeRouter(LABELS, "area")
    assert router.resolve(params(cartridge_label="law")) == "law"
    assert router.resolve(extra(cartridge_label="tax")) == "tax"
    assert router.resolve(extra(kv_transfer_params={"cartridge_label": "tax"})) == "tax"
    assert LabelCartridgeRouter(LABELS, "area", "about").resolve(params(about="tax")) == "tax"


def test_a_request_without_a_label_uses_none() -> None:
    router = LabelCartridgeRouter(LABELS, "area")
    assert router.resolve(params(cartridge_id="law")) is None
    assert router.resolve(NOTHING) is None


def test_what_a_router_reads() -> None:
    label, own = LabelCartridgeRouter(LABELS, "area", "about"), ExplicitCartridgeRouter("doc")
    assert (label.keys, own.keys, StaticCartridgeRouter("s").keys) == ({"about"}, {"doc"}, frozenset())
    assert CompositeRouter((label, own, StaticCartridgeRouter("s"))).keys == {"about", "doc"}


def test_a_label_of_any_length_is_told_in_short() -> None:
    with pytest.raises(UnknownCartridge) as raised:
        LabelCartridgeRouter(LABELS, "area").resolve(params(cartridge_label="x\n" * 10_000))
    assert len(str(raised.value)) < 200 and "\n" not in str(raised.value)


def test_a_label_that_nobody_carries_is_an_error() -> None:
    for key, value in (("area", "x"), ("x", "law")):
        with pytest.raises(UnknownCartridge, match=f"{key}='{value}'"):
            LabelCartridgeRouter(LABELS, key).resolve(params(cartridge_label=value))


# -- composite ---------------------------------------------------------------------------------------------------


def test_composite_is_the_first_that_decides() -> None:
    explicit, label, static = (
        ExplicitCartridgeRouter(),
        LabelCartridgeRouter(LABELS, "area"),
        StaticCartridgeRouter("s"),
    )
    assert CompositeRouter((explicit, static)).resolve(params(cartridge_id="a")) == "a"
    assert CompositeRouter((explicit, static)).resolve(NOTHING) == "s"
    assert CompositeRouter((static, explicit)).resolve(params(cartridge_id="a")) == "s"
    assert CompositeRouter((explicit, label)).resolve(params(cartridge_label="tax")) == "tax"
    assert CompositeRouter((explicit, label)).resolve(NOTHING) is None
    assert CompositeRouter((CompositeRouter((explicit,)), static)).resolve(NOTHING) == "s"


def test_what_one_router_does_not_know_a_later_one_may() -> None:
    by_area, by_name = LabelCartridgeRouter(LABELS, "area"), LabelCartridgeRouter(LABELS, "name")
    assert CompositeRouter((by_name, by_area)).resolve(params(cartridge_label="tax")) == "tax"
    assert CompositeRouter((by_area, StaticCartridgeRouter("s"))).resolve(params(cartridge_label="x")) == "s"
    with pytest.raises(UnknownCartridge, match="name='x'"):
        CompositeRouter((by_name, by_area, ExplicitCartridgeRouter())).resolve(params(cartridge_label="x"))


# -- from a configuration ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "router"),
    [
        ({}, StaticCartridgeRouter("d")),
        (None, StaticCartridgeRouter("d")),
        ({"type": "explicit"}, ExplicitCartridgeRouter("cartridge_id")),
        ({"key": "document"}, ExplicitCartridgeRouter("document")),
        ({"type": "explicit", "key": "document"}, ExplicitCartridgeRouter("document")),
        ({"type": "static", "cartridge_id": "a"}, StaticCartridgeRouter("a")),
        ({"type": "static"}, StaticCartridgeRouter("d")),
        ({"type": "label", "label_key": "area"}, LabelCartridgeRouter(LABELS, "area", "cartridge_label")),
        ({"type": "label", "label_key": "area", "extras_key": "x"}, LabelCartridgeRouter(LABELS, "area", "x")),
        (
            {"type": "composite", "routers": [{"type": "explicit"}, {"type": "static"}]},
            CompositeRouter((ExplicitCartridgeRouter(), StaticCartridgeRouter("d"))),
        ),
    ],
)
def test_built(config: dict[str, Any] | None, router: CartridgeRouter) -> None:
    before = repr(config)
    assert build_router_from_config(config, LABELS, "d") == router
    assert repr(config) == before


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "cartridge_id"),
        ({"type": "static"}, "cartridge_id"),
        ({"type": "label", "label_key": "area"}, "registry"),
        ({"type": "label"}, "label_key"),
        ({"type": "label", "label_key": 3}, "label_key"),
        ({"type": "composite"}, "routers"),
        ({"type": "composite", "routers": []}, "routers"),
        ({"type": "composite", "routers": "explicit"}, "routers"),
        ({"type": "composite", "routers": ["explicit"]}, "explicit"),
        ({"type": "composite", "routers": [{}]}, "{}"),
        ({"type": "composite", "routers": [{"type": "x"}]}, "'x'"),
        ({"type": "nearest"}, "'nearest'"),
        ({"type": ["explicit"]}, "explicit"),
        ({"type": None}, "None"),
        ({"type": "explicit", "kee": "document"}, "'kee'"),
        ({"type": "explicit", "key": ""}, "key"),
        ("explicit", "'explicit'"),
    ],
)
def test_not_built(config: Any, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        build_router_from_config(config)
