"""Whose a field of a request is: what nobody reads is refused; nobody gets another cartridge, or none, for it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.engines.vllm.cartridges.fields import check_fields
from kvist.errors import InvalidInput

LABEL = frozenset({"subject"})


def check(params: dict[str, Any], keys: frozenset[str] = LABEL, others: tuple[str, ...] = (), **beside: Any) -> None:
    check_fields({"kv_transfer_params": params, **beside}, keys, others)


@pytest.mark.parametrize("name", ["subjects", "Subject", "cartridge_label", "cartridge", "id", "", "snapshots"])
def test_a_field_that_nobody_reads_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match=rf"kv_transfer_params\.{name}: nobody reads .* goes by subject") as raised:
        check({"subject": "law", name: "tax"})
    assert "other_params" in (raised.value.hint or "")


def test_a_server_that_goes_by_nothing_says_so() -> None:
    with pytest.raises(InvalidInput, match="goes by nothing that a request says"):
        check({"cartridge_label": "law"}, frozenset())


@pytest.mark.parametrize(
    "params",
    [
        {"subject": "law", "cartridge_prefix": "virtual", "cartridge_id": "law"},
        {"do_remote_prefill": True, "do_remote_decode": False, "remote_block_ids": [1], "tp_size": 1},
        {"snapshot": "cid", "sequence": "s"},
        {"lmcache.tag.tenant": "a", "prompt_token_ids": [1]},
        {"subjects": None},
    ],
    ids=["ours", "remote", "snapshots", "lmcache", "null"],
)
def test_fields_that_somebody_reads_pass(params: dict[str, Any]) -> None:
    check(params)


def test_those_of_a_connector_that_the_configuration_names() -> None:
    with pytest.raises(InvalidInput, match="tenant"):
        check({"tenant": "a"})
    check({"tenant": "a"}, others=("tenant",))


def test_beside_the_params_only_what_begins_as_ours_is_looked_at() -> None:
    check({}, subjects="law", cartridge_id="a", temperature_of_mine=1)
    with pytest.raises(InvalidInput, match=r"^cartridge_lable: nobody reads"):
        check({}, cartridge_lable="law")
    check({}, cartridge_lable=None)


@pytest.mark.parametrize("extra", [None, {}, {"kv_transfer_params": None}, {"kv_transfer_params": {}}], ids=str)
def test_who_says_nothing_is_not_refused(extra: dict[str, Any] | None) -> None:
    check_fields(extra, LABEL, ())


@given(st.text(), st.integers() | st.text() | st.dictionaries(st.text(), st.integers()))
def test_whatever_is_said_is_known_or_refused_in_short(name: str, value: Any) -> None:
    try:
        check({name: value})
    except InvalidInput as error:
        assert len(str(error)) < 300
    else:
        assert name in ("subject", "cartridge_id", "cartridge_prefix") or not name.startswith("cartridge")
