import copy
import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.errors import InvalidInput, InvalidManifest
from kvist.hashing import sha256_cid
from kvist.layout import Layout
from kvist.repo import LogicalSeq, Manifest, PageEntry
from kvist.repo.manifest import canonical_json

from .making import LAYOUT, digest, halves, manifest

A, B, C = (f"sha256:{c * 64}" for c in "abc")
GEOMETRY: dict[str, Any] = {"page_size_tokens": 16, "n_layers": 22, "n_heads": 4, "head_dim": 64, "dtype": "bf16"}
FORMAT = {"layout": "paged-batchinvariant-v1"}
PAGES = [{"ix": 0, "k": A, "v": B}, {"ix": 3, "k": B, "v": C}]
SEQS = [{"id": "s", "page_ixs": [3, 0], "fill_in_last_page": 7}]


def encode(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def ours() -> Manifest:
    seqs = [
        LogicalSeq("b", (3, 0), 7, tuple(range(30)), {"sampling": {"t": 0.5}}),
        LogicalSeq("a", (3,), 0),
    ]
    return Manifest(
        Layout(**GEOMETRY, model="m", revision="r"),
        (PageEntry(3, B, C), PageEntry(0, A, B, "ab" * 16)),
        tuple(seqs),
        {"attention": "eager"},
    )


def sliding() -> Manifest:
    """Of a window of 20 tokens: its sequence of 55 tokens has lost its first two pages of 16."""
    layout = Layout(**GEOMETRY, attention="sliding:20", group=1, n_groups=2, memory_order="vllm-nhd")
    return Manifest(layout, (PageEntry(0, A, B), PageEntry(3, B, C)), (LogicalSeq("s", (3, 0), 7, first_page=2),))


# -- identity ------------------------------------------------------------------------------------------------------


def test_any_order_of_insertion_gives_the_same_bytes() -> None:
    one = ours()
    other = dataclasses.replace(one, pages=one.pages[::-1], sequences=one.sequences[::-1])
    assert other.encode() == one.encode()
    assert other == one and other.cid == one.cid == sha256_cid(one.encode())
    assert [page.ix for page in one.pages] == [0, 3]
    assert [seq.id for seq in one.sequences] == ["a", "b"]


def test_the_canonical_bytes_are_pinned() -> None:
    empty = Manifest(Layout(**GEOMETRY))
    assert empty.encode() == (
        b'{"dtype":"bf16","head_dim":64,"kvist":{"fingerprint":"' + empty.layout.fingerprint.encode() + b'",'
        b'"memory_order":"LNHD","model":null,"numerics":{},"revision":null,"tp_rank":0,"tp_size":1,"version":1},'
        b'"layout":"paged-batchinvariant-v1","logical_seqs":[],"n_heads":4,"n_layers":22,"page_size_tokens":16,"pages":[]}'
    )


def test_cids_from_before_there_were_optional_fields_still_hold() -> None:
    assert ours().cid == "sha256:04cda2bc9511eaab121b415ccc9eb9656cc05e462e615b156ad61757b240b088"
    assert Manifest(Layout(**GEOMETRY)).cid == "sha256:7d78a5803aca329b5be04cbe7cb043b7406f1bfc88ee896f45798425890df63b"
    assert ours().layout.fingerprint == "sha256:5704d300a32aece6e0857b5f271acf256e298ec859b0e19bc1236afec3621a3f"
    for name in (b"n_groups", b'"group"', b'"attention":"full"', b"first_page"):
        assert name not in ours().encode()


def test_reads_back_what_it_wrote() -> None:
    assert Manifest.decode(ours().encode()) == ours()
    assert Manifest.decode(memoryview(ours().encode())) == ours()


def test_page_order_of_a_sequence_and_fill_survive() -> None:
    data = halves(4)
    made = manifest(data, seqs=[LogicalSeq("s", (3, 2, 1, 0), 2)])
    again = Manifest.decode(made.encode()).sequence("s")
    assert again is not None and (again.page_ixs, again.fill_in_last_page) == ((3, 2, 1, 0), 2)
    assert made.sequence("other") is None


def test_name_and_time_are_not_part_of_it() -> None:
    foreign = {**FORMAT, **GEOMETRY, "pages": PAGES}
    cids = {Manifest.decode(encode(foreign | extra)).cid for extra in ({}, {"name": "x"}, {"name": "y"})}
    assert len(cids) == 1
    assert not {"name", "created_ns", "message"} & {field.name for field in dataclasses.fields(Manifest)}


def test_every_field_is_part_of_it() -> None:
    base = ours()
    variants = [
        base,
        dataclasses.replace(base, layout=dataclasses.replace(base.layout, revision="s")),
        dataclasses.replace(base, layout=dataclasses.replace(base.layout, tp_size=2)),
        dataclasses.replace(base, layout=dataclasses.replace(base.layout, memory_order="LHND")),
        dataclasses.replace(base, layout=dataclasses.replace(base.layout, memory_order="vllm-nhd")),
        dataclasses.replace(base, layout=dataclasses.replace(base.layout, attention="mla")),
        dataclasses.replace(base, layout=dataclasses.replace(base.layout, n_groups=2)),
        dataclasses.replace(base, layout=dataclasses.replace(base.layout, n_groups=2, group=1)),
        sliding(),
        dataclasses.replace(sliding(), sequences=(dataclasses.replace(sliding().sequences[0], first_page=1),)),
        dataclasses.replace(base, numerics={}),
        dataclasses.replace(base, sequences=()),
        dataclasses.replace(base, pages=(*base.pages, PageEntry(9, A, A))),
    ]
    assert len({variant.cid for variant in variants}) == len(variants)


# -- the encodings in the wild -------------------------------------------------------------------------------------


def test_reads_the_rust_writers_order() -> None:
    document = {**FORMAT, **GEOMETRY, "pages": PAGES, "logical_seqs": SEQS}
    found = Manifest.decode(encode(document))
    assert found.layout == Layout(**GEOMETRY)
    assert found.pages == (PageEntry(0, A, B), PageEntry(3, B, C))
    assert found.sequences == (LogicalSeq("s", (3, 0), 7),)


def test_reads_the_python_plugins_sorted_keys() -> None:
    document = {**FORMAT, **GEOMETRY, "pages": PAGES, "name": "session 1"}
    data = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    found = Manifest.decode(data)
    assert found.sequences == () and len(found.pages) == 2


def test_reads_the_sdks_empty_manifest() -> None:
    zero = {**GEOMETRY, "n_layers": 0, "n_heads": 0, "head_dim": 0}
    document = {**FORMAT, **zero, "pages": [], "logical_seqs": []}
    found = Manifest.decode(json.dumps(document, sort_keys=True).encode())
    assert found.pages == () and found.layout.page_bytes == 0 and found.tokens == 0
    assert Manifest.decode(found.encode()) == found


def test_reads_page_size_bytes_and_checks_it() -> None:
    size = Layout(**GEOMETRY).page_bytes
    document = {**FORMAT, **GEOMETRY, "pages": PAGES, "page_size_bytes": size}
    assert len(Manifest.decode(encode(document)).pages) == 2
    with pytest.raises(InvalidManifest, match=f"page_size_bytes must be {size}, got {size + 1}"):
        Manifest.decode(encode(document | {"page_size_bytes": size + 1}))


def test_all_foreign_encodings_of_one_content_have_one_cid() -> None:
    base = {**FORMAT, **GEOMETRY, "pages": PAGES}
    forms = [base, base | {"logical_seqs": []}, base | {"name": "n"}, dict(sorted(base.items()))]
    assert len({Manifest.decode(encode(form)).cid for form in forms}) == 1


# -- what is refused -----------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("expected layout", {"layout": "paged-v2"}),
    ("expected layout", {"layout": None}),
    ("ix 0 occurs twice", {"pages": [PAGES[0], PAGES[0]]}),
    ("which the manifest does not hold", {"logical_seqs": [{**SEQS[0], "page_ixs": [0, 7]}]}),
    ("fill_in_last_page must be below 16", {"logical_seqs": [{**SEQS[0], "fill_in_last_page": 17}]}),
    ("fill_in_last_page must be below 16", {"logical_seqs": [{**SEQS[0], "fill_in_last_page": 16}]}),
    ("fill_in_last_page must be an integer", {"logical_seqs": [{**SEQS[0], "fill_in_last_page": -1}]}),
    ("fill_in_last_page", {"logical_seqs": [{"id": "s", "page_ixs": [], "fill_in_last_page": 1}]}),
    ("names a page ix twice", {"logical_seqs": [{**SEQS[0], "page_ixs": [0, 0]}]}),
    ("occurs twice", {"logical_seqs": [SEQS[0], SEQS[0]]}),
    ("expected a name", {"logical_seqs": [{**SEQS[0], "id": 5}]}),
    ("expected a name", {"logical_seqs": [{**SEQS[0], "id": None}]}),
    ("segment", {"logical_seqs": [{**SEQS[0], "id": "../x"}]}),
    ("digest", {"pages": [{"ix": 0, "k": A.upper().replace("SHA", "sha"), "v": B}]}),
    ("digest", {"pages": [{"ix": 0, "k": "md5:" + "a" * 32, "v": B}]}),
    ("digest", {"pages": [{"ix": 0, "k": None, "v": B}]}),
    ("lacks", {"pages": [{"ix": 0, "k": A}]}),
    ("unknown", {"pages": [{"ix": 0, "k": A, "v": B, "w": C}]}),
    ("block hash", {"pages": [{"ix": 0, "k": A, "v": B, "block": "XY"}]}),
    ("page ix must be", {"pages": [{"ix": 2**32, "k": A, "v": B}]}),
    ("page ix must be", {"pages": [{"ix": True, "k": A, "v": B}]}),
    ("page ix must be", {"pages": [{"ix": 0.0, "k": A, "v": B}]}),
    ("must be an array", {"pages": {}}),
    ("must be an object", {"pages": [1]}),
    ("must be an array", {"logical_seqs": None}),
    ("must be an array", {"logical_seqs": [{**SEQS[0], "page_ixs": "0"}]}),
    ("dtype", {"dtype": "int8"}),
    ("dtype", {"dtype": []}),
    ("dtype", {"dtype": {"a": 1}}),
    ("n_layers", {"n_layers": -1}),
    ("n_layers", {"n_layers": "22"}),
    ("page_size_tokens", {"page_size_tokens": 0}),
    ("pages hold no bytes", {"n_layers": 0}),
    ("unknown", {"extra": 1}),
    ("kvist", {"kvist": {}}),
    ("kvist", {"kvist": {"version": 1}}),
    ("kvist version 1", {"kvist": {"version": 2}}),
    ("must be an object", {"kvist": []}),
]


@pytest.mark.parametrize(("why", "change"), REFUSED, ids=[f"{i}-{why}" for i, (why, _) in enumerate(REFUSED)])
def test_refuses(why: str, change: dict[str, Any]) -> None:
    document = {**FORMAT, **GEOMETRY, "pages": PAGES, "logical_seqs": SEQS} | change
    with pytest.raises(InvalidManifest, match=why):
        Manifest.decode(encode(document))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"\xff",
        b"{",
        b'{"a":1,"a":2}',
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":1e999}',
        b'{"a":"\\ud800"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":' + b"9" * 5000 + b"}",
        ours().encode().decode().encode("utf-16"),
        b"\xef\xbb\xbf" + ours().encode(),
    ],
    ids=range(15),
)
def test_refuses_bytes_that_are_no_strict_json_object(data: bytes) -> None:
    with pytest.raises(InvalidManifest):
        Manifest.decode(data)


def test_refuses_every_truncation() -> None:
    data = ours().encode()
    for size in range(len(data)):
        with pytest.raises(InvalidManifest):
            Manifest.decode(data[:size])


def test_refuses_our_document_in_another_encoding() -> None:
    document = json.loads(ours().encode())
    for other in (
        json.dumps(document).encode(),
        encode(dict(reversed(document.items()))),
        canonical_json(document) + b"\n",
    ):
        with pytest.raises(InvalidManifest, match="canonical"):
            Manifest.decode(other)


def test_refuses_a_wrong_fingerprint() -> None:
    document = json.loads(ours().encode())
    document["kvist"]["fingerprint"] = A
    with pytest.raises(InvalidManifest, match=f"expected fingerprint {ours().layout.fingerprint}"):
        Manifest.decode(canonical_json(document))


def test_refuses_fewer_token_ids_than_cached_tokens() -> None:
    data = halves(2)
    for ids, fine in ((7, False), (8, True), (9, True), (0, True)):
        seq = LogicalSeq("s", (0, 1), 0, tuple(range(ids)))
        if fine:
            manifest(data, seqs=[seq])
        else:
            with pytest.raises(InvalidManifest, match="7 token ids for 8 cached tokens"):
                manifest(data, seqs=[seq])


@pytest.mark.parametrize(
    "state",
    [
        {1: "a"},
        {9: 0, 10: 0},
        {"a": (1, 2)},
        {"a": math.nan},
        {"a": math.inf},
        {"a": "\ud800"},
        {"a": b"x"},
        {"a": {2: 3}},
    ],
)
def test_refuses_state_that_would_read_back_different(state: dict[Any, Any]) -> None:
    data = halves(1)
    with pytest.raises(InvalidManifest, match="JSON"):
        manifest(data, seqs=[LogicalSeq("s", (0,), 0, (), state)])
    with pytest.raises(InvalidManifest, match="JSON"):
        Manifest(LAYOUT, numerics=state)


def test_optional_fields_are_written_only_where_they_are_uncommon() -> None:
    document = json.loads(sliding().encode())
    assert {name: document["kvist"][name] for name in ("attention", "group", "n_groups")} == {
        "attention": "sliding:20",
        "group": 1,
        "n_groups": 2,
    }
    assert document["logical_seqs"][0]["kvist"] == {"first_page": 2, "state": {}, "token_ids": []}
    assert Manifest.decode(sliding().encode()) == sliding()


@pytest.mark.parametrize(("name", "default"), [("attention", "full"), ("group", 0), ("n_groups", 1)])
def test_refuses_an_optional_field_written_with_its_default(name: str, default: object) -> None:
    document = json.loads(ours().encode())
    document["kvist"][name] = default
    with pytest.raises(InvalidManifest, match="canonical"):
        Manifest.decode(canonical_json(document))


def test_refuses_a_first_page_written_as_0() -> None:
    document = json.loads(ours().encode())
    document["logical_seqs"][1]["kvist"]["first_page"] = 0
    with pytest.raises(InvalidManifest, match="canonical"):
        Manifest.decode(canonical_json(document))


@pytest.mark.parametrize("first_page", [-1, 2**32, True, 1.0, "1", None, [], {}])
def test_refuses_a_first_page_that_is_no_u32(first_page: Any) -> None:
    document = json.loads(sliding().encode())
    document["logical_seqs"][0]["kvist"]["first_page"] = first_page
    with pytest.raises(InvalidManifest, match="first_page must be an integer"):
        Manifest.decode(canonical_json(document))


@pytest.mark.parametrize("attention", ["full", "mla"])
def test_refuses_a_first_page_where_all_pages_are_needed(attention: str) -> None:
    made = sliding()
    with pytest.raises(InvalidManifest, match=f"got 2 with 2 pages of {attention} attention"):
        dataclasses.replace(made, layout=dataclasses.replace(made.layout, attention=attention))
    with pytest.raises(InvalidManifest, match="first_page must be 0 without pages"):
        dataclasses.replace(made, sequences=(LogicalSeq("s", (), first_page=1),))


def test_token_ids_reach_over_the_pages_that_are_not_held() -> None:
    made = sliding()
    for ids, fine in ((0, True), (23, False), (54, False), (55, True), (56, True)):
        seq = dataclasses.replace(made.sequences[0], token_ids=tuple(range(ids)))
        if fine:
            again = dataclasses.replace(made, sequences=(seq,))
            assert Manifest.decode(again.encode()) == again
        else:
            with pytest.raises(InvalidManifest, match=f"{ids} token ids for 55 cached tokens"):
                dataclasses.replace(made, sequences=(seq,))


class _Int64(int):
    """As numpy's: equal to an int, and none."""


@pytest.mark.parametrize("ix", [True, 0.0, "0", None, -1, 2**32, _Int64(0)])
def test_refuses_a_page_ix_that_is_no_plain_int(ix: Any) -> None:
    data = halves(2)
    with pytest.raises(InvalidManifest, match="page ix must be an integer"):
        manifest(data, seqs=[LogicalSeq("s", (0, ix))])


@pytest.mark.parametrize("state", [None, [], "", 0, False, [("a", 1)]])
def test_refuses_state_that_is_no_mapping(state: Any) -> None:
    with pytest.raises(InvalidManifest, match="state must be a mapping"):
        manifest(halves(1), seqs=[LogicalSeq("s", (0,), 0, (), state)])
    with pytest.raises(InvalidManifest, match="numerics must be a mapping"):
        Manifest(LAYOUT, numerics=state)


def test_refuses_state_nested_too_deep() -> None:
    state: dict[str, Any] = {}
    for _ in range(100_000):
        state = {"a": state}
    with pytest.raises(InvalidManifest, match="JSON"):
        Manifest(LAYOUT, numerics=state)


def test_bad_arguments_are_invalid_manifests_too() -> None:
    with pytest.raises(InvalidManifest):
        Manifest(LAYOUT, (PageEntry(0, "x", A),))
    with pytest.raises(InvalidManifest):
        Manifest(LAYOUT, (), (LogicalSeq("", ()),))
    with pytest.raises(InvalidManifest):
        Manifest(LAYOUT, (PageEntry("0", A, A), PageEntry(1, A, A)))  # type: ignore[arg-type]


# -- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seqs", "tokens"),
    [
        ([], 12),
        ([LogicalSeq("a", (0, 1, 2))], 12),
        ([LogicalSeq("a", (0, 1, 2), 1)], 9),
        ([LogicalSeq("a", (0, 1), 1)], 9),  # page 2 is in no sequence: whole
        ([LogicalSeq("a", (0, 1), 1), LogicalSeq("b", (0, 1), 3)], 4 + 3 + 4),
        ([LogicalSeq("a", (0, 1), 3), LogicalSeq("b", (0, 1), 1)], 4 + 3 + 4),
        ([LogicalSeq("a", (0, 1, 2)), LogicalSeq("b", (0, 1), 1)], 12),
    ],
)
def test_tokens_counts_a_shared_page_once_by_the_fullest(seqs: list[LogicalSeq], tokens: int) -> None:
    assert manifest(halves(3), seqs=seqs).tokens == tokens


def test_pages_before_the_first_hold_no_tokens() -> None:
    made = sliding()
    assert made.sequences[0].cached_tokens(16) == 55
    assert made.tokens == 16 + 7


def test_cached_tokens() -> None:
    assert LogicalSeq("a", ()).cached_tokens(16) == 0
    assert LogicalSeq("a", (1,)).cached_tokens(16) == 16
    assert LogicalSeq("a", (1, 2), 3).cached_tokens(16) == 19
    assert LogicalSeq("a", (1, 2), 3, first_page=1).cached_tokens(16) == 35
    assert LogicalSeq("a", (1,), first_page=4).cached_tokens(16) == 80


def test_digests_come_k_then_v_in_page_order() -> None:
    data = halves(2)
    assert list(manifest(data).digests) == [digest(half) for half in data]


# -- fuzz ----------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([A, "bf16", "a", 2**32]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def decodes_or_is_refused(data: bytes) -> None:
    try:
        found = Manifest.decode(data)
    except InvalidManifest:
        return
    assert Manifest.decode(found.encode()) == found


@given(st.binary(max_size=200) | json_values.map(encode))
def test_anything_is_refused_or_decodes(data: bytes) -> None:
    decodes_or_is_refused(data)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deeper for key, inner in items for deeper in paths(inner, (*path, key)))]


FOREIGN: dict[str, Any] = {**FORMAT, **GEOMETRY, "pages": PAGES, "logical_seqs": SEQS}


DOCUMENTS = [FOREIGN, json.loads(ours().encode()), json.loads(sliding().encode())]


@given(st.data(), st.sampled_from(DOCUMENTS), st.integers(1, 3), st.booleans())
def test_mutations_of_good_documents_are_refused_or_decode(
    data: st.DataObject, document: dict[str, Any], changes: int, canonical: bool
) -> None:
    document = copy.deepcopy(document)
    for _ in range(changes):
        *path, last = data.draw(st.sampled_from(paths(document)[1:]))
        holder: Any = document
        for key in path:
            holder = holder[key]
        match data.draw(st.sampled_from(["replace", "delete", "add", "nudge"])):
            case "delete":
                del holder[last]
            case "add" if isinstance(holder, dict):
                holder[data.draw(st.text(max_size=5) | st.sampled_from(["kvist", "name", "block"]))] = data.draw(
                    json_values
                )
            case "nudge" if type(holder[last]) is int:
                holder[last] += data.draw(st.sampled_from([-1, 1, 2**32]))
            case _:
                holder[last] = data.draw(json_values)
    try:
        written = canonical_json(document) if canonical else encode(document)
    except ValueError:
        written = encode(document)
    decodes_or_is_refused(written)


@given(st.data())
def test_flipped_bytes_are_refused_or_decode(data: st.DataObject) -> None:
    document = bytearray(data.draw(st.sampled_from([encode(FOREIGN), ours().encode(), sliding().encode()])))
    for _ in range(data.draw(st.integers(1, 3))):
        document[data.draw(st.integers(0, len(document) - 1))] ^= data.draw(st.integers(1, 255))
    decodes_or_is_refused(bytes(document))


@given(
    pages=st.lists(st.tuples(st.integers(0, 2**32 - 1), st.booleans()), unique_by=lambda page: page[0], max_size=32),
    names=st.lists(st.from_regex(r"[a-z0-9][a-z0-9._+@-]{0,8}x", fullmatch=True), unique=True, max_size=4),
    attention=st.sampled_from(["full", "mla", "sliding:1", "sliding:4096"]),
    group=st.integers(0, 2),
    groups_after=st.integers(0, 2),
    data=st.data(),
)
def test_every_valid_manifest_reads_back(
    pages: list[tuple[int, bool]],
    names: list[str],
    attention: str,
    group: int,
    groups_after: int,
    data: st.DataObject,
) -> None:
    layout = dataclasses.replace(LAYOUT, attention=attention, group=group, n_groups=group + 1 + groups_after)
    entries = [PageEntry(ix, A, B if same else A, "ab" * 8 if same else None) for ix, same in pages]
    seqs = []
    for name in names:
        ixs = data.draw(st.lists(st.sampled_from([ix for ix, _ in pages]), unique=True)) if pages else []
        fill = data.draw(st.integers(0, 3)) if ixs else 0
        first_page = data.draw(st.integers(0, 9)) if ixs and layout.sliding_window else 0
        ids = data.draw(st.just(()) | st.just(tuple(range(4 * (first_page + len(ixs)) + 2))))
        state = data.draw(st.just({}) | st.just({"é": [1.5, None, "\u2028"]}))
        seqs.append(LogicalSeq(name, tuple(ixs), fill, ids, state, first_page))
    made = Manifest(layout, tuple(entries), tuple(seqs))
    assert Manifest.decode(made.encode()) == made
    assert isinstance(made.tokens, int)
    assert issubclass(InvalidManifest, InvalidInput)
