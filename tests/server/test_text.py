"""Text as tokens come: whole characters, and ends at stop strings."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from kvist.server.text import Detokenizer, StopStrings

text = st.text(st.characters(codec="utf-8"))


def decode(pieces: Sequence[bytes]) -> str:
    """A byte-level decoder whose "ids" are the bytes themselves."""
    return b"".join(pieces).decode(errors="replace")


def run(prompt: Sequence[bytes], pieces: Sequence[bytes]) -> list[str]:
    detokenizer = Detokenizer(decode, prompt)  # type: ignore[arg-type]
    return [*(detokenizer.push(piece) for piece in pieces), detokenizer.flush()]  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(text, st.lists(st.integers(1, 3)))
def test_text_comes_in_whole_characters_however_it_is_cut(whole: str, cuts: list[int]) -> None:
    data, pieces = whole.encode(), []
    for cut in [*cuts, *[1] * len(data)]:
        pieces.append(data[:cut])
        data = data[cut:]
    out = run([], [piece for piece in pieces if piece])
    assert "".join(out) == whole
    assert "\ufffd" in whole or not any("\ufffd" in part for part in out)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=3)), st.lists(st.binary(min_size=1, max_size=3)))
def test_any_bytes_join_to_what_decoding_at_once_gives(prompt: list[bytes], pieces: list[bytes]) -> None:
    before, out = decode(prompt), "".join(run(prompt, pieces))
    # U+FFFD at the prompt's end may have become a character
    assert decode([*prompt, *pieces]).endswith(out)
    assert len(out) >= len(decode([*prompt, *pieces])) - len(before)


def test_junk_is_given_out_while_it_comes() -> None:
    out = run([], [b"\x80"] * 50)
    assert "".join(out) == "\ufffd" * 50
    assert "".join(out[:20]).count("\ufffd") >= 15


def test_a_character_over_prompt_and_output() -> None:
    assert "".join(run([b"a", "ä".encode()[:1]], ["ä".encode()[1:], b"b"])) == "äb"


LLAMA = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
GEMMA = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]


def byte_fallback(parts: list[decoders.Decoder]) -> Tokenizer:
    """Letters and the space are tokens, all else is bytes: as Llama 2, Mistral and Gemma do it."""
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz", *(f"<0x{byte:02X}>" for byte in range(256)), "<unk>"]
    vocab = {letter: number for number, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


@pytest.mark.parametrize("parts", [LLAMA, GEMMA], ids=["llama", "gemma"])
@pytest.mark.parametrize(
    "whole",
    [
        "🌲🌳🌴🌵🌾🌿🍀🍁🍂🍃 ok",
        "a 👨\u200d👩\u200d👧\u200d👦 b",
        "木の枝から枝が生える。" * 4,
        "é日🌲x" * 8,
        "  a  木  ",
    ],
)
def test_byte_fallback_streams_what_it_decodes_at_once(parts: list[decoders.Decoder], whole: str) -> None:
    tokenizer = byte_fallback(parts)
    ids = tokenizer.encode(whole.replace(" ", "\u2581")).ids
    text = tokenizer.decode(ids)
    assert text.strip() == whole.strip()
    for prompt in range(len(ids) + 1):
        detokenizer = Detokenizer(tokenizer.decode, ids[:prompt])
        out = [*map(detokenizer.push, ids[prompt:]), detokenizer.flush()]
        assert not any("\ufffd" in part for part in out)
        # a character that the prompt began belongs to the output
        settled = next(n for n in range(prompt, -1, -1) if "\ufffd" not in tokenizer.decode(ids[:n]))
        assert tokenizer.decode(ids[:settled]) + "".join(out) == text


def test_byte_fallback_with_broken_bytes_keeps_the_text_around_them() -> None:
    tokenizer = byte_fallback(LLAMA)
    broken = tokenizer.token_to_id("<0xF0>")
    start, end = tokenizer.encode("🌲" * 5).ids, tokenizer.encode("木\u2581b").ids
    detokenizer = Detokenizer(tokenizer.decode)
    ids = [*start, broken, tokenizer.token_to_id("a"), *end]
    assert "".join([*map(detokenizer.push, ids), detokenizer.flush()]) == "🌲" * 5 + "\ufffda木 b"


@settings(max_examples=40, deadline=None)
@given(text, st.lists(st.text(min_size=1, max_size=4), max_size=3), st.lists(st.integers(1, 5)))
def test_stop_strings_are_found_over_any_cut(whole: str, stops: list[str], cuts: list[int]) -> None:
    watcher, out, rest = StopStrings(stops), "", whole
    for cut in [*cuts, *[2] * len(whole)]:
        out += watcher.push(rest[:cut])
        rest = rest[cut:]
    out += watcher.flush()
    assert watcher.found is None or watcher.found in stops
    assert (watcher.found is not None) == any(stop in whole for stop in stops)
    assert whole.startswith(out + (watcher.found or ""))
    assert not any(stop in out for stop in stops)


def test_what_may_become_a_stop_string_waits() -> None:
    watcher = StopStrings(["END", "ENOUGH"])
    assert [watcher.push(part) for part in ("a", "E", "N", "x", "EN", "OUGH!", "more")] == [
        "a",
        "",
        "",
        "ENx",
        "",
        "",
        "",
    ]
    assert watcher.found == "ENOUGH"
    assert watcher.flush() == ""
