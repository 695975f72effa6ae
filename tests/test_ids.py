import pytest

from kvist.errors import InvalidInput, InvalidName
from kvist.ids import check_name, digest_hex, format_digest, parse_cid, parse_digest, short

HEX = "0123456789abcdef" * 4


def test_digests() -> None:
    for text in ("sha256:" + HEX, "blake3:" + HEX):
        assert parse_digest(text) == text
        assert digest_hex(text) == HEX and short(text) == HEX[:12]
    assert format_digest("blake3", bytes(32)) == "blake3:" + "0" * 64
    assert parse_cid("sha256:" + HEX)


@pytest.mark.parametrize(
    "text",
    ["", HEX, "md5:" + HEX, "sha256:" + HEX[:-1], "sha256:" + HEX + "0", "sha256:" + HEX.upper(), "SHA256:" + HEX,
     "sha256:" + "g" * 64, "sha256:" + HEX + "\n", " sha256:" + HEX, "sha256:" + "٠" * 64, None, 5, b"sha256:"],
)  # fmt: skip
def test_refuses_what_is_no_digest(text: object) -> None:
    for parse in (parse_digest, parse_cid):
        with pytest.raises(InvalidInput):
            parse(text)


def test_a_cid_is_sha256() -> None:
    with pytest.raises(InvalidInput, match="expected a cid"):
        parse_cid("blake3:" + HEX)


@pytest.mark.parametrize(
    "name", ["a", "main", "A/b.c/d_e", "9", "a" * 200, "v1.0+rc@x-y", "deadbeef", "a.refs", "x.tmp1"]
)
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "/", "/a", "a/", "a//b", ".", "..", "a/..", ".a", "-a", "_a", "a b", "a\n", "a:b", "a\\b", "é", "a\0", "a.ref",
     "a.lock", "a.tmp/b", "a" * 201, HEX, "~a", None, 5, b"a"],
)  # fmt: skip
def test_refuses_names(name: object) -> None:
    with pytest.raises(InvalidName):
        check_name(name)
