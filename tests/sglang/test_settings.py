"""What an operator says, and what requests are called."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvist.engines.sglang import requests
from kvist.engines.sglang.settings import VARIABLE, Settings, from_environment
from kvist.errors import InvalidInput


def test_without_settings_there_is_no_kvist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert from_environment() is None


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, '{"store": "file:///srv/kv", "host_bytes": 5, "on_lost_pages": "compute"}')
    assert from_environment() == Settings(store="file:///srv/kv", host_bytes=5, on_lost_pages="compute")


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", "{}", '{"store": 7}', '{"store": ""}', '{"store": "a", "stores": 1}'),
        *('{"store": "a", "host_bytes": 0}', '{"store": "a", "on_lost_pages": "guess"}'),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the variable's name, never ignored."""
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(InvalidInput, match=VARIABLE):
        from_environment()


def test_names() -> None:
    """A client's name, with what made it unlike any other; the samples of one request."""
    rid = requests.called("story")
    assert requests.called("story") != rid
    sample = requests.choice(rid)
    assert requests.choice(sample) != sample
    assert {requests.whole(requests.choice(sample)), requests.whole(sample), requests.whole(rid)} == {rid}
    assert {requests.name(each) for each in (rid, sample, f"{rid}_1", requests.choice(f"{rid}_0"))} == {"story"}
    for wanted in ("story", rid, sample, requests.choice(rid)):
        assert requests.is_called(sample, wanted)
    for other in ("story2", "story-2", "1_story", "cmpl-story"):
        assert not requests.is_called(requests.called(other), "story")
    assert not requests.is_called(rid, requests.called("story"))


@pytest.mark.parametrize("pair", [("job_00000001", "job_00000002"), ("run-20251122", "run-20251121"), ("a", "ab")])
def test_ids_that_clients_choose_themselves_are_all_name(pair: tuple[str, str]) -> None:
    """A snapshot of the one does not take the other too."""
    one, other = pair
    assert requests.name(one) == requests.whole(one) == one
    assert not requests.is_called(other, one)
    assert requests.is_called(requests.choice(one), one)


def test_salts_keep_apart() -> None:
    """Also where SGLang keeps an extra key beside the salt."""

    def salt(**what: str | None) -> str | None:
        return requests.own_salt(SimpleNamespace(**{"cache_salt": None, "extra_key": None} | what))

    assert salt() is None
    assert salt(cache_salt="a") == "a"
    found = {salt(cache_salt=a, extra_key=b) for a in (None, "a", "b") for b in (None, "a", "b")}
    assert len(found) == 9
