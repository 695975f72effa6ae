"""Trace files: reading, with an error that names the line; and writing. `kvist.sim.trace` tells their form."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np

from kvist.errors import InvalidInput, NotFound
from kvist.sim.files import write_whole
from kvist.sim.trace.columns import MAX_MS, MAX_TOKENS, MOONCAKE_BLOCK_SIZE, Trace, TraceBuilder


def read_trace(path: str | Path, *, block_size: int | None = None, limit: int | None = None) -> Trace:
    """Read a trace file. ``.gz`` and ``.zst`` at the end of its name say how it is packed.

    Args:
        path: of the file.
        block_size: tokens of one trace block; if ``None``, what the file says, else 512.
        limit: read so many requests of the file, and no further.

    Raises:
        NotFound: there is no such file.
        InvalidInput: it holds no request, or a line that is wrong; the message names file, line and field.
    """
    path = Path(path)
    if block_size is not None and not 1 <= block_size <= MAX_TOKENS:
        raise InvalidInput(f"block_size: expected 1 to {MAX_TOKENS}, got {block_size}")
    if limit is not None and limit < 1:
        raise InvalidInput(f"limit: expected 1 or more, got {limit}")
    reader = _Reader(TraceBuilder(MOONCAKE_BLOCK_SIZE if block_size is None else block_size), block_size)
    for number, line in _lines(path):
        try:
            reader.take(line)
        except _WrongLine as error:
            raise InvalidInput(f"{path}, line {number}: {error}") from error.__cause__
        if len(reader.rows) == limit:
            break
    if not len(reader.rows):
        raise InvalidInput(f"{path}: expected one request or more, got none")
    return reader.rows.build(path.name.partition(".")[0] or path.name)


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    kvist_trace: int
    block_size: int = MOONCAKE_BLOCK_SIZE


class _Row(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    hash_ids: list[int]
    timestamp: float | None = None
    created_time: float | None = None
    input_length: int | None = None
    input_tokens: int | None = None
    output_length: int | None = None
    output_tokens: int | None = None
    session_id: str | None = None
    delay: float | None = None
    delay_ms: float | None = None
    after: str | None = None
    request_id: str | None = None
    priority: int | None = None
    strict_priority: int | None = None
    output_token_ids: list[int] | None = None


_decode = msgspec.json.Decoder(_Row).decode


class _WrongLine(Exception):
    """What is wrong with a line."""

    @classmethod
    def field(cls, name: str, expected: str, got: object) -> _WrongLine:
        return cls(f"{name}: expected {expected}, got {got}")


@dataclass(slots=True)
class _Session:
    last_row: int
    last_time: float | None


@dataclass(slots=True)
class _Reader:
    """Takes lines, and fills `rows`."""

    rows: TraceBuilder
    asked_block_size: int | None
    is_first_line: bool = True
    first_time: float | None = None
    sessions: dict[str, _Session] = field(default_factory=dict)

    def take(self, line: bytes) -> None:
        is_header = self.is_first_line and b'"kvist_trace"' in line
        self.is_first_line = False
        try:
            if is_header:
                self.header(msgspec.json.decode(line, type=_Header))
            else:
                self.row(_decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _WrongLine(_complaint(error, line, _Header if is_header else _Row)) from error

    def header(self, header: _Header) -> None:
        if header.kvist_trace != 1:
            raise _WrongLine.field("kvist_trace", "1", header.kvist_trace)
        if not 1 <= header.block_size <= MAX_TOKENS:
            raise _WrongLine.field("block_size", f"1 to {MAX_TOKENS}", header.block_size)
        if self.asked_block_size not in (None, header.block_size):
            raise _WrongLine.field("block_size", f"{self.asked_block_size}, as asked for", header.block_size)
        self.rows.block_size = header.block_size

    def row(self, row: _Row) -> None:
        inputs = _count(row, "input_length", "input_tokens", 1)
        outputs = _count(row, "output_length", "output_tokens", 0)
        ids = row.hash_ids
        if inputs > len(ids) * self.rows.block_size:
            held = f"{len(ids)} blocks of {self.rows.block_size} tokens"
            raise _WrongLine.field("hash_ids", f"enough for input_length {inputs}", held)
        if min(ids) < 0 or max(ids) >= 2**64:
            raise _WrongLine.field("hash_ids", "0 to 2**64 - 1", min(ids) if min(ids) < 0 else max(ids))
        if row.output_token_ids is not None and len(row.output_token_ids) != outputs:
            raise _WrongLine.field("output_token_ids", f"{outputs}, as output_length", len(row.output_token_ids))
        name = str(len(self.rows)) if row.request_id is None else row.request_id
        if name in self.rows.request_ids:
            raise _WrongLine.field("request_id", "a name that no earlier line has", repr(name))
        time = _either(row, "timestamp", "created_time")
        previous, delay = self.order(row, time)
        if previous < 0 and time is not None:
            self.first_time = time if self.first_time is None else self.first_time
            if abs(time - self.first_time) > MAX_MS:
                raise _WrongLine.field("timestamp", f"{MAX_MS:g} ms or less from the first", f"{time:g}")
        self.rows.add(
            inputs, outputs, ids, arrival_ms=time, previous=previous, delay_ms=delay, request_id=row.request_id
        )

    def order(self, row: _Row, time: float | None) -> tuple[int, float]:
        """After which row it comes, and how long after."""
        delay = _either(row, "delay", "delay_ms")
        previous = -1
        if row.after is not None:
            if row.session_id is not None or time is not None:
                raise _WrongLine.field("after", "neither session_id nor timestamp beside it", "one of them")
            if row.after not in self.rows.request_ids:
                raise _WrongLine.field("after", "the request_id of an earlier line", repr(row.after))
            previous = self.rows.request_ids[row.after]
        elif row.session_id is not None:
            session = self.sessions.setdefault(row.session_id, _Session(-1, None))
            previous = session.last_row
            if previous >= 0 and delay is None and time is not None and session.last_time is not None:
                delay = time - session.last_time
                if delay < 0:
                    raise _WrongLine.field("timestamp", f"{session.last_time:g} or more, its session's last", time)
            session.last_row = len(self.rows)
            session.last_time = session.last_time if time is None else time
        if previous < 0 and delay is not None:
            raise _WrongLine.field("delay", "none on a request that follows no other", delay)
        if delay is not None and not 0 <= delay <= MAX_MS:
            raise _WrongLine.field("delay", f"0 to {MAX_MS:g} ms", delay)
        return previous, delay or 0.0


def _either(row: _Row, name: str, other: str) -> Any:
    value, same = getattr(row, name), getattr(row, other)
    if value is not None and same is not None:
        raise _WrongLine.field(name, f"either it or {other}", "both")
    return same if value is None else value


def _count(row: _Row, name: str, other: str, least: int) -> int:
    value = _either(row, name, other)
    if value is None:
        raise _WrongLine.field(name, "a number", "none")
    if not least <= value <= MAX_TOKENS:
        raise _WrongLine.field(name, f"{least} to {MAX_TOKENS}", value)
    return int(value)


def _complaint(error: Exception, line: bytes, form: type[_Header | _Row]) -> str:
    """What msgspec says, with the field first and with what was found, where the line can be read that far."""
    if isinstance(error, RecursionError):
        return "expected an object of fields, got values within values without end"
    said, _, place = str(error).partition(" - at `$.")
    if unknown := re.search(r"unknown field `(.*)`", said):
        return f"{unknown[1][:60]}: expected a field that is known ({', '.join(form.__struct_fields__)}), got this one"
    said = said.replace("Expected", "expected").replace("`", "").replace(" | null", "")
    field_and_index = re.match(r"(\w+)(?:\[(\d+)\])?", place)
    if field_and_index is None:
        return said
    name, index = field_and_index.groups()
    said = f"{field_and_index[0]}: {said.partition(', got')[0]}"
    try:
        got = json.loads(line)[name]
        got = repr(got if index is None else got[int(index)])
    except (ValueError, LookupError, TypeError, RecursionError):  # broken off after it, nested deeply, there twice
        return said
    return f"{said}, got {got if len(got) <= 60 else f'{got[:57]}...'}"


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank."""
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    yield number, line
    except FileNotFoundError as error:
        raise NotFound(f"there is no trace {path}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidInput(f"{path}, after line {number}: cannot be read: {error}") from error


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as file:
        match path.suffix:
            case ".gz":
                with io.BufferedReader(gzip.GzipFile(fileobj=file)) as unpacked:
                    yield unpacked
            case ".zst":
                yield io.BytesIO(b"".join(_frames(file.read())))
            case _:
                yield file


def _frames(packed: bytes) -> Iterator[bytes]:
    """What the Zstandard frames hold. One that is cut off is an error; its stream readers take it for the end."""
    import zstandard

    while packed:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            yield frame.decompress(packed)
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from error
        if not frame.eof:
            raise EOFError("the last frame is cut off")
        packed = frame.unused_data


# -- writing ---------------------------------------------------------------------------------------------------------


def write_trace(trace: Trace, path: str | Path) -> None:
    """Write a trace so that `read_trace` gives it back. Packed as the end of the name says, see `read_trace`.

    It is plain Mooncake, which others read too, unless the trace forks or its blocks are not of 512 tokens.

    Raises:
        StoreError: the file cannot be written; what stood there stays.
    """
    path = Path(path)
    lines = _written(trace)
    match path.suffix:
        case ".gz":
            write_whole(path, [gzip.compress(b"".join(lines), mtime=0)])
        case ".zst":
            import zstandard

            write_whole(path, [zstandard.ZstdCompressor(write_checksum=True).compress(b"".join(lines))])
        case _:
            write_whole(path, lines)


def _written(trace: Trace) -> Iterator[bytes]:
    encode = msgspec.json.encode
    parents = trace.previous[trace.previous >= 0]
    with_next = set(parents.tolist())
    forks = len(with_next) < len(parents)
    sessions: dict[int, str] = {}  # of a row that has a next turn
    if forks or trace.block_size != MOONCAKE_BLOCK_SIZE:
        yield encode({"kvist_trace": 1, "block_size": trace.block_size}) + b"\n"
    for row, name in enumerate(trace.request_ids):
        time, previous = trace.arrival_ms[row], int(trace.previous[row])
        line: dict[str, Any] = {} if np.isnan(time) else {"timestamp": _number(time)}
        line["input_length"] = int(trace.input_tokens[row])
        line["output_length"] = int(trace.output_tokens[row])
        line["hash_ids"] = trace.blocks(row).tolist()
        if forks and previous >= 0:
            line |= {"after": trace.request_ids[previous], "delay": _number(trace.delay_ms[row])}
        elif previous >= 0:
            sessions[row] = sessions[previous]
            line |= {"session_id": sessions[row], "delay": _number(trace.delay_ms[row])}
        elif row in with_next and not forks:
            sessions[row] = line["session_id"] = name
        if name != str(row) or row in with_next:
            line["request_id"] = name
        yield encode(line) + b"\n"


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)
