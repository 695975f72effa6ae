"""Names of vLLM's requests, and of their sequences."""

from __future__ import annotations

import pytest

from kvist.engines.vllm.names import is_called, request_of, sequence_id


def test_what_vllm_draws_is_no_part_of_the_name() -> None:
    assert sequence_id("cmpl-talk-0-0123abcd") == sequence_id("cmpl-talk-0") == "cmpl-talk-0"
    assert sequence_id("no name\n-0123abcd").startswith("request-")


@pytest.mark.parametrize("wanted", ["talk", "cmpl-talk", "cmpl-talk-0", "1_cmpl-talk-0", "1_cmpl-talk-0-0123abcd"])
def test_a_request_is_meant_by_each_of_its_names(wanted: str) -> None:
    assert is_called("1_cmpl-talk-0-0123abcd", wanted)
    assert not is_called("1_cmpl-talking-0-0123abcd", wanted)


def test_another_request_is_not() -> None:
    assert not is_called("talk", "cmpl-talk") and not is_called("cmpl-talk-0-0123abcd", "cmpl-talk-0-4567abcd")


def test_the_request_of_which_a_sequence_is_one_choice() -> None:
    assert request_of("1_cmpl-talk-0") == "cmpl-talk-0"
    assert request_of("cmpl-talk-0") == "cmpl-talk"
    assert request_of("cmpl-talk") == "cmpl-talk"
