"""What the front end makes of a request, without vLLM: which cartridge, where it stands, and what cannot be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvist.cartridge.cartridge import Cartridge
from kvist.cartridge.library import Entry, Library
from kvist.cartridge.model import ModelIdentity
from kvist.cartridge.registry import Registry
from kvist.cartridge.routing import ExplicitCartridgeRouter, StaticCartridgeRouter
from kvist.engines.vllm.cartridges.documents import Prefixes, TokenIds
from kvist.engines.vllm.cartridges.frontend import Frontend
from kvist.engines.vllm.cartridges.placing import KEY, SALT, Asked, Placed, Placement, salt_of
from kvist.errors import DamagedCartridge, InvalidInput, LayoutMismatch, UnknownCartridge

MODEL = ModelIdentity(model_id="m", num_layers=2, num_kv_heads=2, head_dim=4, dtype="float32")
DOCUMENT = tuple(range(100, 133))
"""33 tokens: no multiple of any block size."""
LONGEST = 100


def save(root: Path, name: str, *, ids: tuple[int, ...] | None = None, tokens: int = 33, **settings: Any) -> Path:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    layers = [(torch.randn(tokens, 2, 4, generator=generator), torch.randn(tokens, 2, 4, generator=generator))] * 2
    made = Cartridge.create(layers, settings.pop("model", MODEL), cartridge_id=name, token_ids=ids, **settings)
    return made.save_pretrained(root / name)


def entry(path: Path) -> Entry:
    with Cartridge.from_pretrained(path) as cartridge:
        return Entry(cartridge.manifest.cartridge_id, path, cartridge.manifest)


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Entry]:
    """One that knows its document, one that does not, and one that begins elsewhere."""
    root = tmp_path_factory.mktemp("cartridges")
    paths = [save(root, "text", ids=DOCUMENT), save(root, "trained", training_steps=5)]
    paths.append(save(root, "later", first_position=16))
    return {path.name: entry(path) for path in paths}


def frontend(entries: dict[str, Entry], **settings: Any) -> Frontend:
    library = Library(entries.values(), model=MODEL)
    return Frontend(library, settings.pop("router", ExplicitCartridgeRouter()), max_model_len=LONGEST, **settings)


def asked(ids: list[int] | None, name: str | None = "text", **fields: Any) -> Asked:
    params = {"cartridge_id": name} if name is not None else {}
    params |= fields.pop("params", {})
    return Asked(ids, {"kv_transfer_params": params}, **fields)


def place(entries: dict[str, Entry], *request: Any, **fields: Any) -> Placed:
    placed = frontend(entries).place(asked(*request, **fields))
    assert placed is not None
    return placed


def test_a_question_is_placed_after_the_cartridge(entries: dict[str, Entry]) -> None:
    placed = place(entries, [1, 2, 3], max_tokens=5)
    manifest = entries["text"].manifest
    assert placed.placement == Placement("text", manifest.identity, 33, str(entries["text"].directory), True)
    assert placed.placement.prefix_tokens == 33
    assert placed.max_tokens == 5
    assert placed.salt == SALT + manifest.identity


def test_a_prompt_that_repeats_the_document_is_not(entries: dict[str, Entry]) -> None:
    placed = place(entries, [*DOCUMENT, 1])
    assert not placed.placement.placed
    assert placed.placement.prefix_tokens == 0
    assert placed.max_tokens == LONGEST - 34


@pytest.mark.parametrize(
    "prompt", [list(DOCUMENT[:-1]), [1, *DOCUMENT], [*DOCUMENT[:32], 1, 2]], ids=["cut", "off", "other"]
)
def test_one_that_nearly_does_is_placed(entries: dict[str, Entry], prompt: list[int]) -> None:
    assert place(entries, prompt).placement.placed


def test_modes_by_request_and_by_configuration(entries: dict[str, Entry]) -> None:
    virtual = {"params": {"cartridge_prefix": "virtual"}}
    assert place(entries, [*DOCUMENT, 1], **virtual).placement.placed
    strict = frontend(entries, prefix="prompt")
    with pytest.raises(InvalidInput, match=r"must begin with the 33 token ids.* 2 of them agree"):
        strict.place(asked([100, 101, 5]))
    with pytest.raises(InvalidInput, match="knows no token ids"):
        strict.place(asked([100, 101, 5], "trained"))
    assert strict.place(asked([100, 101, 5], **virtual)) is not None
    with pytest.raises(InvalidInput, match="auto, virtual, prompt"):
        strict.place(asked([1], params={"cartridge_prefix": "sometimes"}))


def test_without_a_cartridge_nothing_changes(entries: dict[str, Entry]) -> None:
    for request in (asked([1], None), Asked([1]), Asked([1], {"other": 1}), asked(None, None, strange="anything")):
        assert frontend(entries).place(request) is None


def test_an_unknown_id_is_refused_or_computed(entries: dict[str, Entry], caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UnknownCartridge, match="there is no cartridge 'nobody'; there are: text"):
        frontend(entries).place(asked([1], "nobody"))
    assert frontend(entries, refuses_unknown=False).place(asked([1], "nobody")) is None
    assert "computed without a cartridge" in caplog.text


@pytest.mark.parametrize("params", [7, "text", ["cartridge_id"]], ids=str)
def test_params_that_are_no_object(entries: dict[str, Entry], params: Any) -> None:
    with pytest.raises(InvalidInput, match="kv_transfer_params: expected an object"):
        frontend(entries).place(Asked([1], {"kv_transfer_params": params}))


@pytest.mark.parametrize("value", [True, 1.5, ["text"], {"id": "text"}], ids=str)
def test_ids_of_a_wrong_type(entries: dict[str, Entry], value: Any) -> None:
    with pytest.raises(InvalidInput, match="cartridge_id"):
        frontend(entries).place(asked([1], value))


def test_what_only_kvist_may_say(entries: dict[str, Entry]) -> None:
    """A marker or a salt of a client's own would let it read what others placed."""
    marker = place(entries, [1]).placement.to_marker()
    for name in ("text", None):
        with pytest.raises(InvalidInput, match=KEY):
            frontend(entries).place(asked([1], name, params={KEY: marker}))
        with pytest.raises(InvalidInput, match="cache_salt"):
            frontend(entries).place(asked([1], name, salt=SALT + marker["identity"]))


def test_salts_keep_tenants_and_cartridges_apart(entries: dict[str, Entry]) -> None:
    salts = [place(entries, [1], name, salt=salt).salt for name in ("text", "trained") for salt in (None, "a", "b")]
    assert len(set(salts)) == len(salts)
    assert all(salt.startswith(SALT) for salt in salts)
    assert salt_of("x", "") == salt_of("x", None)


def test_length_is_refused_with_all_that_counts(entries: dict[str, Entry]) -> None:
    room = LONGEST - 33
    assert place(entries, [1] * (room - 1)).max_tokens == 1
    with pytest.raises(InvalidInput, match=f"has 33 tokens, the prompt {room}, .* maximum of {LONGEST}"):
        place(entries, [1] * room)
    with pytest.raises(InvalidInput, match="at least 8 must be sampled"):
        place(entries, [1] * (room - 7), min_tokens=8)


def test_max_tokens_is_what_there_is_room_for(entries: dict[str, Entry]) -> None:
    assert place(entries, [1, 2], max_tokens=90).max_tokens == 65
    assert place(entries, [1, 2], max_tokens=None).max_tokens == 65
    assert place(entries, [1, 2], max_tokens=7).max_tokens == 7


def test_what_cannot_be_had_with_a_cartridge(entries: dict[str, Entry]) -> None:
    for prompt in ([1], [*DOCUMENT, 1]):
        with pytest.raises(InvalidInput, match="prompt_logprobs"):
            place(entries, prompt, needs_prompt=True)
    with pytest.raises(InvalidInput, match="cannot be used with a multimodal prompt"):
        place(entries, [1], strange="a multimodal prompt")
    with pytest.raises(InvalidInput, match="without token ids"):
        place(entries, None)
    with pytest.raises(InvalidInput, match="begins at position 16"):
        place(entries, [1], "later")


def test_where_loads_are_recomputed_token_ids_are_needed(entries: dict[str, Entry]) -> None:
    careful = frontend(entries, recomputes=True)
    assert careful.place(asked([1])) is not None
    with pytest.raises(InvalidInput, match=r"has no token ids.*kv_load_failure_policy"):
        careful.place(asked([1], "trained"))


def test_the_default_needs_no_name(entries: dict[str, Entry]) -> None:
    static = frontend(entries, router=StaticCartridgeRouter("trained"))
    placed = static.place(Asked([1], None))
    assert placed is not None and placed.placement.id == "trained"


def test_the_registry_is_followed(tmp_path: Path) -> None:
    """Added and removed while it runs, and one for another model."""
    with Registry(tmp_path / "registry.db") as registry:
        mine = Frontend(Library(registry=registry, model=MODEL), ExplicitCartridgeRouter(), max_model_len=LONGEST)
        with pytest.raises(UnknownCartridge):
            mine.place(asked([1]))
        path = save(tmp_path, "text", ids=DOCUMENT)
        registry.register(entry(path).manifest, str(path))
        assert mine.place(asked([1])) is not None
        alien = save(tmp_path, "alien", model=replace(MODEL, model_id="another"))
        registry.register(entry(alien).manifest, str(alien))
        with pytest.raises(LayoutMismatch, match="another"):
            mine.place(asked([1], "alien"))
        registry.unregister("text")
        with pytest.raises(UnknownCartridge):
            mine.place(asked([1]))


def test_markers_survive_the_way_and_forged_ones_do_not(entries: dict[str, Entry]) -> None:
    placed = place(entries, [1])
    marked = placed.mark({"other": 1, "kv_transfer_params": {"cartridge_id": "text"}})
    assert marked["other"] == 1
    assert marked["kv_transfer_params"]["cartridge_id"] == "text"
    assert Placement.of(marked["kv_transfer_params"]) == placed.placement
    assert Placement.of(None) is None
    assert Placement.of({"cartridge_id": "text"}) is None
    for forged in ({"id": "text"}, 7, {**placed.placement.to_marker(), "more": 1}):
        with pytest.raises(InvalidInput):
            Placement.of({KEY: forged})


def test_what_stands_for_a_cartridge(entries: dict[str, Entry], tmp_path: Path) -> None:
    prefixes = Prefixes()

    def ids(*request: Any) -> list[int]:
        found, skips = prefixes.of(place(entries, *request).mark(None)["kv_transfer_params"], 7)
        assert skips == 0
        return found

    assert ids([1]) == list(DOCUMENT)
    assert ids([*DOCUMENT, 1]) == []
    assert ids([1], "trained") == [7] * 33
    assert prefixes.of({}, 7) == ([], 0)


def test_a_text_s_beginning_is_left_out(entries: dict[str, Entry]) -> None:
    """Of texts, which a tokenizer or a chat template began; never of ids, which the client chose."""
    begun = frontend(entries, bos_id=1)

    def skips(ids: list[int], **fields: Any) -> int:
        placed = begun.place(asked(ids, **fields))
        assert placed is not None
        return placed.placement.skips

    assert skips([1, 5, 6], is_text=True) == 1
    assert skips([5, 1, 6], is_text=True) == 0
    assert skips([1, 5, 6]) == 0
    assert skips([1], is_text=True) == 0
    assert skips([*DOCUMENT, 1], is_text=True) == 0
    placed = begun.place(asked([1, 5], is_text=True))
    assert placed is not None
    assert Prefixes().of(placed.mark(None)["kv_transfer_params"], 7) == (list(DOCUMENT), 1)


def test_a_directory_that_was_replaced(entries: dict[str, Entry], tmp_path: Path) -> None:
    other = save(tmp_path, "other")
    with pytest.raises(DamagedCartridge, match="expected the cartridge"):
        TokenIds().of(entries["text"].manifest.identity, other)
