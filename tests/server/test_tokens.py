"""The tokens file: what it holds, who may write it, and that every change counts at once."""

import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.errors import (
    AlreadyExists,
    InvalidInput,
    InvalidName,
    KvistError,
    NotFound,
    StoreError,
    Unauthorized,
)
from kvist.server.tokens import Grant, Scope, Tokens, add_token, check_tenant, read_tokens, remove_token


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


def test_a_token_grants_what_it_was_made_for(path: Path) -> None:
    text = add_token(path, "ci", Scope.WRITE, tenant="acme", note="for tests")
    admin = add_token(path, "me", Scope.ADMIN)
    tokens = Tokens(path)
    assert tokens.grant_of(text) == Grant("ci", Scope.WRITE, "acme")
    assert tokens.grant_of(admin) == Grant("me", Scope.ADMIN, None)
    assert tokens.tenants == {"acme"}
    for wrong in ("", "kvist_", text[:-1], text + "=", text.upper(), admin + text, "\ud800", "x" * 100_000):
        with pytest.raises(Unauthorized, match="unknown, or has expired"):
            tokens.grant_of(wrong)


def test_the_file_is_private_and_holds_no_token(path: Path) -> None:
    before = os.umask(0)
    try:
        text = add_token(path, "a", Scope.READ)
        add_token(path, "b", Scope.READ)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert text not in path.read_text() and text.removeprefix("kvist_") not in path.read_text()
    assert len(text.removeprefix("kvist_")) == 43  # 256 bits
    assert text not in repr(Tokens(path)) + repr(Tokens(path).grant_of(text))


def test_every_change_counts_at_once(path: Path) -> None:
    text = add_token(path, "a", Scope.READ)
    tokens = Tokens(path)
    more = add_token(path, "b", Scope.ADMIN)
    assert tokens.grant_of(more).id == "b"
    remove_token(path, "a")
    with pytest.raises(Unauthorized):
        tokens.grant_of(text)
    assert [token.id for token in read_tokens(path)] == ["b"]
    with pytest.raises(NotFound, match="no token 'a'"):
        remove_token(path, "a")
    with pytest.raises(AlreadyExists):
        add_token(path, "b", Scope.READ)


def test_where_the_file_cannot_be_trusted_nobody_is_let_in(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = add_token(path, "a", Scope.READ)
    tokens, whole = Tokens(path), path.read_bytes()
    for break_it in (
        lambda: path.write_bytes(whole[:-20]),
        lambda: path.write_text("{}"),
        lambda: path.chmod(0o622),
        path.unlink,
    ):
        break_it()
        for _ in range(2):
            caplog.clear()
            with pytest.raises(StoreError) as refused:
                tokens.grant_of(text)
            assert str(refused.value) == "nobody can be let in"  # a caller may be anybody
            assert str(path) in caplog.text
        if not path.exists() or path.read_bytes() != whole:
            path.write_bytes(whole)
        path.chmod(0o600)
        assert tokens.grant_of(text).id == "a"


def test_a_token_ends_when_it_expires(path: Path) -> None:
    now = 1_000.0
    text = add_token(path, "a", Scope.READ, expires=1_010)
    tokens = Tokens(path, clock=lambda: now)
    assert tokens.grant_of(text).id == "a"
    now = 1_010.0
    with pytest.raises(Unauthorized):
        tokens.grant_of(text)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_can_write_is_refused(path: Path, mode: int) -> None:
    add_token(path, "a", Scope.READ)
    path.chmod(mode)
    with pytest.raises(InvalidInput, match="others can change") as refused:
        Tokens(path)
    assert refused.value.hint == f"chmod 600 {path}"


def _document(**changes: object) -> dict[str, object]:
    token = {"id": "a", "digest": "sha256:" + "0" * 64, "scope": "read"}
    return {"format": "kvist-tokens", "version": 1, "tokens": [token | changes]}


@pytest.mark.parametrize(
    "document",
    [
        b"", b"[]", b"\xff", b"{", b"[" * 100_000,
        _document(scope="root"), _document(scope="open"), _document(digest="0" * 64), _document(digest="md5:0"),
        _document(id=""), _document(id="a/b"), _document(id="-a"), _document(tenant="../b"), _document(tenant="a/b"),
        _document(tenant=""), _document(expires=-1), _document(expires="tomorrow"), _document(expires=2**60),
        _document(token="kvist_secret"),
        {"format": "kvist-tokens", "version": 2, "tokens": []},
        {"format": "kvist-tokens", "version": 1, "tokens": 2 * _document()["tokens"]},  # type: ignore[operator]
    ],
)  # fmt: skip
def test_what_is_no_tokens_file(path: Path, document: object) -> None:
    path.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
    path.chmod(0o600)
    with pytest.raises(InvalidInput):
        Tokens(path)


def test_there_must_be_a_file(path: Path) -> None:
    with pytest.raises(NotFound) as refused:
        Tokens(path)
    assert "kvist token add" in (refused.value.hint or "")


def test_two_who_edit_lose_nothing(path: Path) -> None:
    threads = [threading.Thread(target=add_token, args=(path, f"t{number}", Scope.READ)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(token.id for token in read_tokens(path)) == sorted(f"t{number}" for number in range(12))
    assert [each.name for each in path.parent.iterdir() if each.name.startswith(".")] == []


def test_a_request_never_sees_a_file_that_is_being_read(path: Path) -> None:
    text, seen = add_token(path, "a", Scope.READ), []
    tokens, done = Tokens(path), threading.Event()

    def ask() -> None:
        while not done.is_set():
            try:
                seen.append(tokens.grant_of(text).id)
            except KvistError as error:
                seen.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(20):
        add_token(path, f"t{number}", Scope.READ)
    done.set()
    for thread in threads:
        thread.join()
    assert set(seen) == {"a"}


@pytest.mark.parametrize(
    "wrong", ["", ".", "..", "../a", "a/b", "/a", "a/", "-a", ".a", "a b", "a\0", "a\n", "ä", "a" * 65, "x.tmp",
              "f" * 64, None, 5, "a\\b", "%2e%2e", "a?b", "a#b"],
)  # fmt: skip
def test_names_that_no_tenant_can_have(wrong: object) -> None:
    with pytest.raises(InvalidName):
        check_tenant(wrong)


@given(st.text(max_size=80))
def test_a_tenant_lies_right_below_tenants(name: str) -> None:
    try:
        good = check_tenant(name)
    except InvalidName:
        return
    here = Path("/srv/kv/tenants") / good
    assert here.parent == Path("/srv/kv/tenants") and here.resolve() == here and good not in (".", "..")


def test_scopes_are_ordered_and_named() -> None:
    assert Scope.OPEN < Scope.READ < Scope.WRITE < Scope.ADMIN
    assert [Scope.parse(text) for text in ("read", "write", "admin")] == [Scope.READ, Scope.WRITE, Scope.ADMIN]
    for wrong in ("open", "READ", "", "root"):
        with pytest.raises(InvalidInput, match="read, write or admin"):
            Scope.parse(wrong)
