"""What the front end makes of a request, without vLLM: which cartridge, where it stands, and what cannot be."""

from __future__ import annotations

import json
import struct
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvist.cartridge.cartridge import Cartridge
from kvist.cartridge.library import Entry, Library
from kvist.cartridge.model import ModelIdentity
from kvist.cartridge.placing import Prefix
from kvist.cartridge.registry import Registry
from kvist.cartridge.routing import ExplicitCartridgeRouter, StaticCartridgeRouter
from kvist.engines.vllm.cartridges.documents import Documents, Prefixes
from kvist.engines.vllm.cartridges.frontend import Frontend
from kvist.engines.vllm.cartridges.placing import KEY, SALT, Asked, Placed, Placement, Served, Standing, salt_of
from kvist.errors import (
    CartridgeNotReady,
    DamagedCartridge,
    InvalidInput,
    LayoutMismatch,
    StoreError,
    UnknownCartridge,
)

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
    router = settings.pop("router", ExplicitCartridgeRouter())
    kinds = {name: settings.pop(name) for name in Served.__dataclass_fields__ if name in settings}
    usable = [one for one in entries.values() if not kinds.get("recomputes") or one.manifest.has_token_ids]
    return Frontend(Library(usable, model=MODEL), router, served(**kinds), **settings)


def served(**settings: Any) -> Served:
    return Served(**{"max_model_len": LONGEST, "vocabulary": 512, **settings})


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
    assert placed.placement == Placement(Prefix("text", manifest.identity, 33, placed=True))
    assert placed.max_tokens == 5
    assert placed.salt == SALT + manifest.identity


def test_a_prompt_that_repeats_the_document_is_not(entries: dict[str, Entry]) -> None:
    placed = place(entries, [*DOCUMENT, 1])
    assert not placed.placement.prefix.placed
    assert placed.max_tokens == LONGEST - 34


@pytest.mark.parametrize(
    "prompt", [list(DOCUMENT[:-1]), [1, *DOCUMENT], [*DOCUMENT[:32], 1, 2]], ids=["cut", "off", "other"]
)
def test_one_that_nearly_does_is_placed(entries: dict[str, Entry], prompt: list[int]) -> None:
    assert place(entries, prompt).placement.prefix.placed


def test_modes_by_request_and_by_configuration(entries: dict[str, Entry]) -> None:
    virtual: dict[str, Any] = {"params": {"cartridge_prefix": "virtual"}}
    assert place(entries, [*DOCUMENT, 1], **virtual).placement.prefix.placed
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


def test_a_field_that_nobody_reads_is_no_plain_request(entries: dict[str, Entry]) -> None:
    """Nor one for the default cartridge; and how a cartridge stands goes with a cartridge."""
    misspelt: dict[str, Any] = {"params": {"cartridge_lable": "law"}}
    for router in (ExplicitCartridgeRouter(), StaticCartridgeRouter("text")):
        one = frontend(entries, router=router)
        for call in (one.place, lambda request, one=one: one.look(request.extra_args)):
            with pytest.raises(InvalidInput, match=r"kv_transfer_params\.cartridge_lable: nobody reads"):
                call(asked([1], None, **misspelt))
    assert frontend(entries, others={"cartridge_lable"}).place(asked([1], None, **misspelt)) is None
    assert frontend(entries).place(asked([1], None, params={"do_remote_prefill": True})) is None
    with pytest.raises(InvalidInput, match="cartridge_prefix: goes with a cartridge"):
        frontend(entries).place(asked([1], None, params={"cartridge_prefix": "virtual"}))


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
        careful.check(entries["trained"])


def test_the_default_needs_no_name(entries: dict[str, Entry]) -> None:
    static = frontend(entries, router=StaticCartridgeRouter("trained"))
    placed = static.place(Asked([1], None))
    assert placed is not None and placed.placement.prefix.cartridge_id == "trained"


def test_the_registry_is_followed(tmp_path: Path) -> None:
    """Added and removed while it runs, and one for another model."""
    with Registry(tmp_path / "registry.db") as registry:
        mine = Frontend(Library(registry=registry, model=MODEL), ExplicitCartridgeRouter(), served())
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


def test_markers_survive_the_way(entries: dict[str, Entry]) -> None:
    placed = place(entries, [1])
    marked = placed.mark({"other": 1, "kv_transfer_params": {"cartridge_id": "text"}})
    assert marked["other"] == 1
    assert marked["kv_transfer_params"]["cartridge_id"] == "text"
    assert Placement.of_marker(marked["kv_transfer_params"][KEY]) == placed.placement


def test_only_the_engine_core_says_what_a_request_begins_with(entries: dict[str, Entry]) -> None:
    """Whatever arrives is data; what the scheduler obeys is an object that no message can carry."""
    marker = place(entries, [1]).placement.to_marker()
    for params in (None, {}, {"cartridge_id": "text"}, {KEY: None}, {KEY: marker}):
        assert Standing.of(SimpleNamespace(kv_transfer_params=params)) is None


def prefixes(entries: dict[str, Entry], **settings: Any) -> Prefixes:
    given = {"vocabulary": 512, "verify": False, **settings}
    library = given.pop("library", None) or Library(entries.values(), model=MODEL)
    return Prefixes(library, Documents(**given), max_model_len=LONGEST, placeholder=7)


def test_what_stands_for_a_cartridge(entries: dict[str, Entry]) -> None:
    core = prefixes(entries)

    def ids(prompt: list[int], *request: Any) -> list[int]:
        placed = place(entries, prompt, *request)
        standing, found = core.of(placed.placement.to_marker(), prompt, placed.salt)
        assert standing.prefix == placed.placement.prefix
        assert standing.directory == str(entries[standing.prefix.cartridge_id].directory)
        return found

    assert ids([1]) == [*DOCUMENT, 1]
    assert ids([*DOCUMENT, 1]) == [*DOCUMENT, 1]
    assert ids([1], "trained") == [*[7] * 33, 1]


FORGED: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "of another length": ({"tokens": 10**12}, InvalidInput),
    "shorter": ({"tokens": 1}, InvalidInput),
    "with a directory": ({"directory": "evil/repo"}, InvalidInput),
    "of no cartridge": ({"id": "nobody"}, UnknownCartridge),
    "of another's content": ({"identity": "0" * 64}, DamagedCartridge),
    "of another cartridge": ({"id": "trained"}, DamagedCartridge),
    "that begins elsewhere": ({"id": "later"}, DamagedCartridge),
    "with a number for a truth": ({"placed": 1}, InvalidInput),
    "that skips": ({"skips": 2}, InvalidInput),
    "that skips backwards": ({"skips": -(10**9)}, InvalidInput),
    "that repeats nothing": ({"placed": False}, InvalidInput),
    "with a list for a name": ({"id": ["text"]}, InvalidInput),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_marker_gets_nothing(entries: dict[str, Entry], case: str) -> None:
    changes, error = FORGED[case]
    placed = place(entries, [1])
    with pytest.raises(error):
        prefixes(entries).of({**placed.placement.to_marker(), **changes}, [1], placed.salt)


@pytest.mark.parametrize("marker", [7, "text", [], {}, {"id": "text"}], ids=str)
def test_a_marker_that_is_none(entries: dict[str, Entry], marker: Any) -> None:
    with pytest.raises(InvalidInput):
        prefixes(entries).of(marker, [1], None)


def test_a_marker_goes_with_its_salt_and_its_prompt(entries: dict[str, Entry]) -> None:
    """Blocks under another salt would be shared with those who use no cartridge, or another one."""
    core, placed = prefixes(entries), place(entries, [1])
    marker, salt = placed.placement.to_marker(), placed.salt
    other = place(entries, [1], "trained").salt
    for wrong in (None, "", "tenant", other, salt[:-1], salt + "0"):
        with pytest.raises(InvalidInput, match="expected the salt"):
            core.of(marker, [1], wrong)
    assert core.of(marker, [1], f"{salt}:tenant")[0].prefix.tokens == 33
    for wrong_prompt in ([], [1] * (LONGEST - 33)):
        with pytest.raises(InvalidInput, match=f"of at most {LONGEST}"):
            core.of(marker, wrong_prompt, salt)
    assert len(core.of(marker, [1] * (LONGEST - 34), salt)[1]) == LONGEST - 1


def test_the_core_follows_the_registry(tmp_path: Path) -> None:
    """One that was replaced since the core looked last; and one that was not, whatever the marker says."""
    with Registry(tmp_path / "registry.db") as registry:
        library = Library(registry=registry, model=MODEL)
        core = prefixes({}, library=library)
        for seed in ("one", "two"):
            path = save(tmp_path, seed, ids=DOCUMENT)
            manifest = replace(entry(path).manifest, cartridge_id="text")
            registry.register(manifest, str(path))
            marker = Placement(Prefix("text", manifest.identity, 33, placed=True)).to_marker()
            assert core.of(marker, [1], SALT + manifest.identity)[0].directory == str(path)
        library.close()


def test_ids_that_the_model_does_not_know(tmp_path: Path) -> None:
    """A penalty, or a recomputation, would look them up where they are not."""
    edge = {"edge": entry(save(tmp_path, "edge", ids=(511, *DOCUMENT[1:])))}
    assert frontend(edge).place(asked([1], "edge")) is not None
    alien = {"alien": entry(save(tmp_path, "alien", ids=(512, *DOCUMENT[1:])))}
    with pytest.raises(LayoutMismatch, match="the token id 512, the vocabulary of the served model 512"):
        frontend(alien)
    with pytest.raises(LayoutMismatch, match="512"):
        prefixes(alien)
    with pytest.raises(LayoutMismatch, match="512"):
        frontend({}).check(alien["alien"])
    with Registry(tmp_path / "registry.db") as registry:
        registry.register(alien["alien"].manifest, str(alien["alien"].directory))
        library = Library(registry=registry, model=MODEL)
        mine = Frontend(library, ExplicitCartridgeRouter(), served())
        with pytest.raises(LayoutMismatch, match="512"):
            mine.place(asked([1], "alien"))
        identity = alien["alien"].manifest.identity
        marker = Placement(Prefix("alien", identity, 33, placed=True)).to_marker()
        with pytest.raises(LayoutMismatch, match="512"):
            prefixes({}, library=library).of(marker, [1], SALT + identity)


def damage_ids(directory: Path, token: int) -> None:
    """Put another first id into the file."""
    (shard,) = directory.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    start, _ = json.loads(data[8 : 8 + size])["token_ids"]["data_offsets"]
    struct.pack_into("<q", data, 8 + size + start, token)
    shard.write_bytes(data)


@pytest.mark.parametrize("token", [7, 5_000_000])
def test_ids_that_are_computed_from_are_verified(tmp_path: Path, token: int) -> None:
    path = save(tmp_path, "text", ids=DOCUMENT)
    mine = {"text": entry(path)}
    early, early_core = frontend(mine, recomputes=True), prefixes(mine, verify=True)
    placed = early.place(asked([1]))
    assert placed is not None
    damage_ids(path, token)
    assert early_core.of(placed.placement.to_marker(), [1], placed.salt)[1] == [*DOCUMENT, 1], "read before"
    with pytest.raises(DamagedCartridge):
        frontend(mine, recomputes=True)
    with pytest.raises(DamagedCartridge):
        prefixes(mine, verify=True)


def test_no_more_than_the_workers_have_room_for(entries: dict[str, Entry], tmp_path: Path) -> None:
    """33 tokens of 2 layers of 2 heads of 4 numbers of 4 bytes, keys and values."""
    nbytes = 33 * 2 * 2 * 4 * 4 * 2

    def check(capacity: int, **settings: Any) -> None:
        frontend({}, capacity=lambda largest: capacity, **settings).check(entries["text"])

    check(nbytes)
    with pytest.raises(InvalidInput, match=f"needs {nbytes} bytes for it, and has {nbytes - 1}"):
        check(nbytes - 1)
    check(nbytes // 2, ranks=2)
    check(1, keeps_all=False)
    frontend(entries, capacity=lambda largest: largest)
    with pytest.raises(InvalidInput, match=f"has {nbytes - 1} for all"):
        frontend(entries, capacity=lambda largest: largest - 1).place(asked([1]))


def test_an_event_loop_is_never_kept_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for a source that is slow, nor for a registry that is away; and what they come to is told afterwards."""
    path = save(tmp_path, "text", ids=DOCUMENT)
    found = entry(path).manifest
    is_open, caller = threading.Event(), threading.get_ident()

    def slow(source: Any, **_: Any) -> Path:
        assert threading.get_ident() != caller
        assert is_open.wait(60)
        return path

    def away(self: Registry) -> int:
        assert threading.get_ident() != caller
        raise StoreError("the registry is away")

    with Registry(tmp_path / "registry.db") as registry:
        registry.register(found, json.dumps({"hub": "org/name"}))
        library = Library(registry=registry, model=MODEL, cache_dir=tmp_path)
        mine = Frontend(library, ExplicitCartridgeRouter(), served(waits=False))
        monkeypatch.setattr("kvist.cartridge.library.materialize", slow)
        monkeypatch.setattr(Registry, "version", away)
        for _ in range(3):
            assert mine.place(Asked([1])) is None
            with pytest.raises(CartridgeNotReady):
                mine.place(asked([1]))
        is_open.set()
        assert until_ready(mine, asked([1])) is not None
        library.close()


def until_ready(mine: Frontend, wanted: Asked) -> Placed | None:
    while True:
        try:
            return mine.place(wanted)
        except CartridgeNotReady:
            time.sleep(0.01)


def test_what_reading_came_to_is_told_and_tried_again(tmp_path: Path) -> None:
    path = save(tmp_path, "text", ids=DOCUMENT)
    good = next(path.glob("*.safetensors")).read_bytes()
    with Registry(tmp_path / "registry.db") as registry:
        registry.register(entry(path).manifest, str(path))
        library = Library(registry=registry, model=MODEL)
        mine = Frontend(library, ExplicitCartridgeRouter(), served(waits=False, recomputes=True))
        damage_ids(path, 7)
        with pytest.raises(DamagedCartridge):
            until_ready(mine, asked([1]))
        next(path.glob("*.safetensors")).write_bytes(good)
        assert until_ready(mine, asked([1])) is not None
        library.close()


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
    _, ids = prefixes(entries).of(placed.placement.to_marker(), [1, 5], placed.salt)
    assert ids == [*DOCUMENT, 5]


def test_a_directory_that_was_replaced(entries: dict[str, Entry], tmp_path: Path) -> None:
    other = save(tmp_path, "other", ids=DOCUMENT)
    with pytest.raises(DamagedCartridge, match="expected"):
        Documents(vocabulary=512, verify=False).of(replace(entries["text"], directory=other))
