"""Trace files: every spelling of the fields, sessions, forks, what is refused; and what is written is read back."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from kvist.errors import InvalidInput, NotFound
from kvist.sim.trace import MAX_MS, Trace, TraceBuilder, read_trace, write_trace

from .conftest import equal


def row(
    time: float | None = 0, inputs: int = 600, outputs: int = 5, ids: list[int] | None = None, **more: Any
) -> dict[str, Any]:
    given = {} if time is None else {"timestamp": time}
    ids = list(range(-(-inputs // 512))) if ids is None else ids
    return given | {"input_length": inputs, "output_length": outputs, "hash_ids": ids} | more


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """Writes rows (or bytes) to a file and reads it."""

    def call(*rows: dict[str, Any] | bytes, name: str = "t.jsonl", **options: Any) -> Trace:
        lines = [one if isinstance(one, bytes) else json.dumps(one).encode() + b"\n" for one in rows]
        (tmp_path / name).write_bytes(b"".join(lines))
        return read_trace(tmp_path / name, **options)

    return call


def test_the_columns(read: Any) -> None:
    trace = read(row(5, 1025, 7, [9, 2, 2**63 - 1]), row(8.25, 1, 0, [9, 4], request_id="x"), name="some.trace.jsonl")
    assert (trace.name, trace.block_size, len(trace)) == ("some", 512, 2)
    assert trace.arrival_ms.tolist() == [0, 3.25]
    assert trace.input_tokens.tolist() == [1025, 1] and trace.output_tokens.tolist() == [7, 0]
    assert trace.offsets.tolist() == [0, 3, 5] and trace.block_ids.tolist() == [9, 2, 2**63 - 1, 9, 4]
    assert trace.previous.tolist() == [-1, -1] and trace.delay_ms.tolist() == [0, 0]
    assert trace.request_ids == ("0", "x")
    assert trace.blocks(1).tolist() == [9, 4]
    for column in (trace.arrival_ms, trace.block_ids, trace.offsets):
        with pytest.raises(ValueError):
            column[0] = 1


def test_both_spellings_and_fields_that_are_not_used(read: Any) -> None:
    ours = row(3, 600, 3, session_id="s"), row(None, 600, 2, session_id="s", delay=4, priority=2, strict_priority=-1)
    theirs = (
        {"created_time": 3, "input_tokens": 600, "output_tokens": 3, "hash_ids": [0, 1], "session_id": "s"},
        {"input_tokens": 600, "output_tokens": 2, "hash_ids": [0, 1], "session_id": "s", "delay_ms": 4}
        | {"output_token_ids": [7, 8], "timestamp": None, "request_id": None},
    )
    equal(read(*ours), read(*theirs))


def test_rows_are_sorted_by_time_and_start_at_zero(read: Any) -> None:
    trace = read(row(500, 601), row(-100, 602), row(500, 603), row(0, 604), b"\n", b"  \n", row(500, 605))
    assert trace.arrival_ms.tolist() == [0, 100, 600, 600, 600]
    assert trace.input_tokens.tolist() == [602, 604, 601, 603, 605]
    assert trace.request_ids == ("1", "3", "0", "2", "4")  # their numbers in the file


def test_times_may_be_missing(read: Any) -> None:
    trace = read(row(None, 601), row(5, 602), row(3, 603))
    assert not trace.has_arrivals
    assert trace.input_tokens.tolist() == [601, 602, 603]  # nothing to sort by
    assert read(row(0), row(None, session_id="a"), row(None, session_id="a")).has_arrivals is False
    assert read(row(0, session_id="a"), row(None, session_id="a")).has_arrivals is True


def test_sessions(read: Any) -> None:
    trace = read(
        row(100, 601, session_id="a"),
        row(50, 602, session_id="b"),
        row(None, 603, session_id="a", delay=5),
        row(None, 604, session_id="b"),
        row(250, 605, session_id="a"),  # 150 after the last time that its session gave
        row(300, 606, session_id="a", delay=7),  # a delay wins
        row(340, 607, session_id="a"),
        row(60, 608),
    )
    by_length = {int(length): number for number, length in enumerate(trace.input_tokens)}
    previous = {601: None, 602: None, 603: 601, 604: 602, 605: 603, 606: 605, 607: 606, 608: None}
    delays = {601: 0, 602: 0, 603: 5, 604: 0, 605: 150, 606: 7, 607: 40, 608: 0}
    for length, number in by_length.items():
        before = previous[length]
        assert trace.previous[number] == (-1 if before is None else by_length[before])
        assert trace.delay_ms[number] == delays[length]
        assert np.isnan(trace.arrival_ms[number]) == (before is not None)
    assert trace.input_tokens.tolist()[:3] == [602, 604, 608]


def test_forks(read: Any) -> None:
    header = {"kvist_trace": 1, "block_size": 16}
    root = row(9, 32, 4, [1, 2], request_id="root")
    trace = read(header, root, *(row(None, 48, 4, [1, 2, n], after="root", delay=n) for n in (5, 3)), block_size=16)
    assert trace.block_size == 16
    assert trace.previous.tolist() == [-1, 0, 0] and trace.delay_ms.tolist() == [0, 3, 5]
    assert trace.request_ids == ("root", "2", "1")
    assert read({"kvist_trace": 1}, row()).block_size == 512


def test_the_head_of_a_trace(read: Any, tmp_path: Path) -> None:
    rows = [row(n, 600, n, [n, n + 1], session_id=str(n % 2)) for n in range(6)]
    trace = read(*rows)
    equal(trace.head(4), read(*rows[:4]))
    equal(trace.head(4), read(*rows, limit=4))
    equal(trace.head(99), trace)
    assert len(trace.head(0)) == 0 and len(trace.head(-3)) == 0
    assert len(read(*rows[:2], b"nonsense", limit=2)) == 2  # not read so far


@pytest.mark.parametrize("name", ["t.jsonl.gz", "t.jsonl.zst"])
def test_packed_files(tmp_path: Path, name: str) -> None:
    plain = "\n".join(json.dumps(row(n)) for n in range(3)).encode()
    pack = gzip.compress if name.endswith("gz") else zstandard.ZstdCompressor().compress
    cut = plain.index(b"\n") + 5  # in two parts, as `cat` makes of two files
    (tmp_path / name).write_bytes(pack(plain[:cut]) + pack(plain[cut:]))
    trace = read_trace(tmp_path / name)
    assert len(trace) == 3 and trace.name == "t"
    write_trace(trace, tmp_path / f"again-{name}")
    equal(read_trace(tmp_path / f"again-{name}"), replace(trace, name=f"again-{trace.name}"))
    for broken in (pack(plain)[:-9], b"not packed"):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(InvalidInput, match=rf"{name}, after line \d: cannot be read"):
            read_trace(tmp_path / name)


def test_large_ids_are_numbered_anew(read: Any) -> None:
    top = 2**64 - 1
    trace = read(row(0, 1500, 1, [top, 7, top - 1]), row(0, 600, 1, [top, 7]))
    ids = trace.block_ids.tolist()
    assert ids[0] == ids[3] and ids[1] == ids[4] and len(set(ids)) == 3 and min(ids) >= 0


SECOND = [
    (row(0, 0), "input_length: expected 1 to 2147483647, got 0"),
    (row(0, 2**31, ids=[1] * 2**5), "input_length: expected 1 to 2147483647, got 2147483648"),
    (row(0, outputs=-1), "output_length: expected 0 to 2147483647, got -1"),
    (row(0, 600, ids=[1]), "hash_ids: expected enough for input_length 600, got 1 blocks of 512 tokens"),
    (row(0, 600, ids=[1, -1]), r"hash_ids: expected 0 to 2\*\*64 - 1, got -1"),
    (row(0, 600, ids=[1, 2**64]), r"hash_ids: expected 0 to 2\*\*64 - 1, got 18446744073709551616"),
    (row(0, 600, ids=[1, "a"]), r"hash_ids\[1\]: expected int, got 'a'"),
    (row(0, input_length=600.5), "input_length: expected int, got 600.5"),
    (row(0, input_length=None), "input_length: expected a number, got none"),
    (row(0, input_tokens=600), "input_length: expected either it or input_tokens, got both"),
    (row(0, created_time=0), "timestamp: expected either it or created_time, got both"),
    (row("0"), "timestamp: expected float, got '0'"),
    (row(2e12), "timestamp: expected 1e[+]12 ms or less from the first, got 2e[+]12"),
    (row(0, colour="red"), r"colour: expected a field that is known \(hash_ids, .*\), got this one"),
    ({"timestamp": 0, "input_length": 1, "output_length": 1}, "Object missing required field hash_ids"),
    ({"timestamp": 0, "hash_ids": [1], "output_length": 1}, "input_length: expected a number, got none"),
    (row(0, output_token_ids=[1]), "output_token_ids: expected 5, as output_length, got 1"),
    (row(0, request_id="0"), "request_id: expected a name that no earlier line has, got '0'"),
    (row(0, session_id=3), "session_id: expected str, got 3"),
    (row(0, delay=3), "delay: expected none on a request that follows no other, got 3"),
    (row(0, session_id="new", delay=3), "delay: expected none on a request that follows no other, got 3"),
    (row(None, session_id="s", delay=-3), "delay: expected 0 to 1e[+]12 ms, got -3"),
    (row(None, session_id="s", delay=3, delay_ms=3), "delay: expected either it or delay_ms, got both"),
    (row(-5, session_id="s"), "timestamp: expected 0 or more, its session's last, got -5"),
    (row(None, after="1"), "after: expected the request_id of an earlier line, got '1'"),
    (row(0, after="0"), "after: expected neither session_id nor timestamp beside it, got one of them"),
    ({"kvist_trace": 1}, "kvist_trace: expected a field that is known"),  # not in the first line
    (b"[1]\n", "expected object, got array"),
    (b"{bad\n", "JSON is malformed"),
    (b'{"request_id": "\xff"}\n', "Invalid|invalid|decode"),
    # what is wrong is followed by what can not be read
    (b'{"timestamp":"x", "input_le\n', "timestamp: expected float"),
    (b'{"hash_ids":[1,"a"\n', r"hash_ids\[1\]: expected int"),
    (b'{"hash_ids":[1,"a"],"request_id":"\xff"}\n', r"hash_ids\[1\]: expected int"),
    (b'{"hash_ids":[1,"a"],"hash_ids":[1]}\n', r"hash_ids\[1\]: expected int"),
    (b'{"hash_ids":' + b"[" * 200_000 + b"\n", r"hash_ids\[0\]: expected int"),
    (b'{"priority":' + b"[" * 200_000 + b"\n", "priority: expected int"),
]


@pytest.mark.parametrize(("second", "message"), SECOND, ids=range(len(SECOND)))
def test_a_bad_line_is_named(read: Any, second: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=rf"t\.jsonl, line 3: .*{message}") as caught:
        read(row(0, session_id="s"), b"\n", second, row())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        ({"kvist_trace": 2}, {}, "line 1: kvist_trace: expected 1, got 2"),
        ({"kvist_trace": 1, "block_size": 0}, {}, "line 1: block_size: expected 1 to 2147483647, got 0"),
        ({"kvist_trace": 1, "block_size": "x"}, {}, "line 1: block_size: expected int, got 'x'"),
        (
            {"kvist_trace": 1, "blocksize": 1},
            {},
            r"line 1: blocksize: expected a field that is known \(kvist_trace, block_size\), got",
        ),
        (
            {"kvist_trace": 1, "block_size": 16},
            {"block_size": 64},
            "line 1: block_size: expected 64, as asked for, got 16",
        ),
        (row(), {"block_size": 0}, "block_size: expected 1 to 2147483647, got 0"),
        (row(), {"limit": 0}, "limit: expected 1 or more, got 0"),
        ({"kvist_trace": 1, "block_size": 10**23}, {}, "line 1: block_size: expected 1 to 2147483647, got 10*$"),
        (row(), {"block_size": 10**23}, "block_size: expected 1 to 2147483647, got 10*$"),
        (b"\n", {}, "expected one request or more, got none"),
        ({"kvist_trace": 1}, {}, "expected one request or more, got none"),
    ],
)
def test_a_bad_header_or_option(read: Any, header: Any, options: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read(header, *([row()] if "none" not in message else []), **options)


def test_a_header_is_the_first_line_or_none(read: Any) -> None:
    with pytest.raises(InvalidInput, match="line 2: kvist_trace: expected a field that is known"):
        read({"kvist_trace": 1}, {"kvist_trace": 1, "block_size": 16}, row())


def test_a_flipped_bit_of_a_packed_file_is_found(read: Any, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl.zst"
    write_trace(read(*(row(i, outputs=i % 7) for i in range(50))), path)
    packed = bytearray(path.read_bytes())
    assert zstandard.get_frame_parameters(bytes(packed)).has_checksum
    packed[-1] ^= 1
    path.write_bytes(packed)
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_trace(path)


def test_there_is_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no trace"):
        read_trace(tmp_path / "none.jsonl")
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_trace(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 0}, "block_size: expected 1 to 2147483647, got 0"),
        ({"output_tokens": np.array([1])}, "output_tokens: expected 2 values, got 1"),
        ({"block_ids": np.array([1])}, "block_ids: expected 4 values, got 1"),
        ({"request_ids": ("a", "a")}, "request_ids: expected all to differ"),
        (
            {"input_tokens": np.array([1, 2000])},
            "request 1: input_tokens: expected no more than its block_ids hold, got 2000",
        ),
        ({"previous": np.array([-1, 1])}, "request 1: previous: expected -1 or an earlier request, got 1"),
        ({"previous": np.array([-1, 0])}, "request 1: arrival_ms: expected NaN, for it has a previous, got 5.0"),
        (
            {"arrival_ms": np.array([3.0, 1.0])},
            "request 1: arrival_ms: expected no less than that of an earlier request",
        ),
        ({"arrival_ms": np.array([3.0, 2 * MAX_MS])}, r"request 1: arrival_ms: expected 0 to 1e\+12, got 2"),
        ({"delay_ms": np.array([0.0, 1.0])}, "request 1: delay_ms: expected 0, for it has no previous, got 1.0"),
        ({"delay_ms": np.array([0.0, np.nan])}, r"request 1: delay_ms: expected 0 to 1e\+12, got nan"),
    ],
)
def test_columns_that_do_not_fit(read: Any, changes: dict[str, Any], message: str) -> None:
    trace = read(row(0), row(5))
    with pytest.raises(InvalidInput, match=message):
        replace(trace, **changes)


def test_a_builder_refuses_a_name_twice() -> None:
    rows = TraceBuilder(64)
    rows.add(1, 1, [0], request_id="1")
    with pytest.raises(InvalidInput, match="request_id: expected a name that no earlier request has"):
        rows.add(1, 1, [0], request_id="1")


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Any trace."""
    rows = TraceBuilder(draw(st.sampled_from([1, 3, 16, 512])))
    forks, has_times, has_names = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    ends: list[int] = []  # rows that another may follow
    for number in range(draw(st.integers(1, 8))):
        inputs = draw(st.integers(1, 5 * rows.block_size))
        ids = draw(st.lists(st.integers(0, 5), min_size=-(-inputs // rows.block_size), max_size=9))
        previous = draw(st.sampled_from([-1, *ends]))
        if previous >= 0 and not forks:
            ends.remove(previous)
        time = draw(st.one_of(st.integers(0, 99), st.floats(0, 1e9))) if has_times else None
        delay = draw(st.one_of(st.integers(0, 99), st.floats(0, 1e9))) if previous >= 0 else 0
        name = f"r{number}" if has_names else None
        ends.append(
            rows.add(
                inputs,
                draw(st.integers(0, 9)),
                ids,
                arrival_ms=time,
                previous=previous,
                delay_ms=delay,
                request_id=name,
            )
        )
    return rows.build("again")


@given(traces())
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, trace: Trace) -> None:
    path = tmp_path_factory.getbasetemp() / "again.jsonl"
    write_trace(trace, path)
    equal(read_trace(path, block_size=trace.block_size), trace)
    shared = trace.previous[trace.previous >= 0].tolist()
    is_ours = trace.block_size != 512 or len(set(shared)) < len(shared)
    assert path.read_bytes().startswith(b'{"kvist_trace"') == is_ours
    if is_ours:
        equal(read_trace(path), trace)
