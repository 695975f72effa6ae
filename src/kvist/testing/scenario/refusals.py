"""`RefusalScenario`: what cannot be is refused in one envelope, with one status and kind on every engine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from kvist.testing.live import LiveServer
from kvist.testing.scenario.base import LiveScenario, Start
from kvist.testing.scenario.requests import (
    CHECKOUT,
    COMPLETIONS,
    FORK,
    GREEDY,
    MORE,
    SNAPSHOT,
    SNAPSHOTS,
    Case,
    Past,
    assert_same,
    check_out,
    error_of,
    go_on,
    interrupt,
    prompt,
)
from kvist.testing.scenario.store import altered, root_of

NOBODY = "sha256:" + "0" * 64
CASE = Case("case", prompt(300, seed=900), GREEDY)
LONG_NAME = "x" * 201


class RefusalScenario(LiveScenario):
    """After every refusal the server still serves, with all of its processes."""

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, store: str, start: Start) -> Iterator[LiveServer]:
        """The server that must outlive all of it."""
        server = start(store)
        yield server
        server.kill()

    @pytest.fixture(scope="class")
    @classmethod
    def past(cls, server: LiveServer) -> Past:
        """A snapshot that is whole."""
        return interrupt(server, CASE, total=cls.total)

    @pytest.fixture(autouse=True)
    def _serving(self, server: LiveServer) -> Iterator[None]:
        before = server.processes()
        yield
        assert len(server.complete([9, 8, 7], max_tokens=3, **GREEDY).steps) == 3
        assert server.http.get("/health").status_code == 200
        assert server.processes() == before

    @pytest.mark.parametrize("field", ["model", "revision", "dtype", "page_size_tokens", "n_heads", "tp_size"])
    def test_another_layout(self, server: LiveServer, past: Past, store: str, field: str) -> None:
        """Both values side by side, by checkout and by name."""
        here = server.get(f"{SNAPSHOTS}/{past.cid}")["layout"]
        half, double = here["head_dim"] // 2, 2 * here["head_dim"]
        there: dict[str, Any] = {
            "model": {"model": "org/another"},
            "revision": {"revision": "another"},
            "dtype": {"bf16": {"dtype": "f16"}, "f16": {"dtype": "bf16"}}.get(
                here["dtype"], {"dtype": "f16", "head_dim": double}
            ),
            "page_size_tokens": {"page_size_tokens": 2 * here["page_size_tokens"], "head_dim": half},
            "n_heads": {"n_heads": 2 * here["n_heads"], "head_dim": half},
            "tp_size": {"tp_size": 2},
        }[field]
        cid = altered(store, past.cid, **there)
        named = {"kv_transfer_params": {"snapshot": cid, "sequence": past.sequence}, "max_tokens": 1}
        for path, body in ((CHECKOUT, {"cid": cid}), (COMPLETIONS, named)):
            message = error_of(server.http.post(path, json=body), 409, "layout_mismatch")
            for name, value in there.items():
                assert f"{name} {value!r} there, {here[name]!r} here" in message

    @pytest.mark.parametrize(
        ("path", "body", "status", "code"),
        [
            (SNAPSHOT, {"request_id": "nobody"}, 404, "not_found"),
            (SNAPSHOT, {"sequence": "nobody"}, 404, "not_found"),
            (SNAPSHOT, {"request_id": 7}, 400, "invalid_input"),
            (SNAPSHOT, {"request_id": "a", "sequence": "b"}, 400, "invalid_input"),
            (SNAPSHOT, {"nonsense": 1}, 400, "invalid_input"),
            (SNAPSHOT, {"parents": [NOBODY], "name": "a"}, 404, "not_found"),
            *((SNAPSHOT, {"name": name}, 400, "invalid_name") for name in ("../x", "/x", "a/../b", "", LONG_NAME)),
            (CHECKOUT, {"cid": NOBODY}, 404, "not_found"),
            (CHECKOUT, {"cid": "no-such-branch"}, 404, "not_found"),
            (CHECKOUT, {"cid": "../../etc/passwd"}, 400, "invalid_name"),
            (FORK, {"cid": "../x"}, 400, "invalid_name"),
            (CHECKOUT, {"cid": 7}, 400, "invalid_input"),
            (CHECKOUT, {"cid": NOBODY, "sequences": "all"}, 400, "invalid_input"),
            (CHECKOUT, {}, 400, "invalid_input"),
            (FORK, {"cid": NOBODY, "n": 2}, 404, "not_found"),
            (FORK, {"cid": NOBODY, "n": 0}, 400, "invalid_input"),
            (FORK, {"n": 2}, 400, "invalid_input"),
            (COMPLETIONS, {"kv_transfer_params": {"snapshot": NOBODY}}, 404, "not_found"),
            (COMPLETIONS, {"kv_transfer_params": {"snapshot": "../x"}}, 400, "invalid_name"),
            (COMPLETIONS, {"kv_transfer_params": {"snapshot": 7}}, 400, None),
        ],
        ids=str,
    )
    def test_what_is_not_there_or_cannot_be(
        self, server: LiveServer, past: Past, path: str, body: dict[str, Any], status: int, code: str | None
    ) -> None:
        """By status and kind."""
        error_of(server.http.post(path, json=body), status, code)

    @pytest.mark.parametrize("path", [SNAPSHOT, CHECKOUT, FORK])
    @pytest.mark.parametrize("content", [b"{", b"[]", b"7", b"\xff"])
    def test_no_json(self, server: LiveServer, path: str, content: bytes) -> None:
        """Or no object."""
        answer = server.http.post(path, content=content, headers={"Content-Type": "application/json"})
        error_of(answer, 400, "invalid_input")

    def test_sequences_that_are_not_there(self, server: LiveServer, past: Past) -> None:
        """In a snapshot that is; by checkout and by name."""
        error_of(server.http.post(CHECKOUT, json={"cid": past.cid, "sequences": ["nobody"]}), 404, "not_found")
        body = {"kv_transfer_params": {"snapshot": past.cid, "sequence": "nobody"}}
        error_of(server.http.post(COMPLETIONS, json=body), 404, "not_found")

    def test_unknown_in_the_list(self, server: LiveServer, past: Past) -> None:
        """A record, or what a rev descends from."""
        error_of(server.http.get(f"{SNAPSHOTS}/{NOBODY}"), 404, "not_found")
        error_of(server.http.get(SNAPSHOTS, params={"rev": NOBODY}), 404, "not_found")
        error_of(server.http.get(SNAPSHOTS, params={"limit": "many"}), 400, "invalid_input")

    def test_a_prompt_that_is_not_the_snapshots(self, server: LiveServer, past: Past) -> None:
        """The message says how much of it agrees."""
        for ids in ([1, 2, 3], past.token_ids[:-1]):
            answer = server.http.post(COMPLETIONS, json={"prompt": ids, "kv_transfer_params": past.named})
            assert str(past.tokens) in error_of(answer, 400, "invalid_input")

    def test_which_of_several(self, server: LiveServer, past: Past) -> None:
        """A snapshot of several sequences is continued by the name of one; they are told."""
        params = {"n": 2, "max_tokens": 8, **GREEDY, "temperature": 1.0, "seed": 3, "return_token_ids": True}
        answer = server.post(COMPLETIONS, {"prompt": prompt(40, seed=904), **params})
        taken = server.post(SNAPSHOT, {"request_id": answer["id"]})
        names = [seq["id"] for seq in taken["sequences"]]
        assert len(names) == 2
        body: dict[str, Any] = {"kv_transfer_params": {"snapshot": taken["cid"]}, "max_tokens": 1}
        message = error_of(server.http.post(COMPLETIONS, json=body), 400, "invalid_input")
        assert all(name in message for name in names)
        for name in names:
            got = server.resume(taken["cid"], name, max_tokens=1)
            assert got.cached_tokens == got.prompt_tokens - 1 == 40 + 8 - 1

    def test_a_branch_that_is_taken(self, server: LiveServer, past: Past) -> None:
        """Forks are new branches."""
        server.post(FORK, {"cid": past.cid, "n": 2, "name": "taken"})
        error_of(server.http.post(FORK, json={"cid": past.cid, "n": 1, "name": "taken"}), 409, "already_exists")

    def test_methods_and_paths(self, server: LiveServer) -> None:
        """That no route takes."""
        error_of(server.http.get(SNAPSHOT), 405, "method_not_allowed")
        error_of(server.http.post(f"{SNAPSHOT}s/x/y", json={}), 405, "method_not_allowed")

    def test_after_all_of_it(self, server: LiveServer, past: Past) -> None:
        """What was whole still goes on, in every bit."""
        check_out(server, past)
        got = go_on(server, past)
        assert_same(got.steps, past.next_steps())
        assert got.cached_tokens == past.tokens - 1

    def test_the_store_is_gone(self, server: LiveServer, past: Past, store: str) -> None:
        """Last: nothing of it is left, in the middle of everything. What runs goes on."""
        salt = {"cache_salt": "gone"} if self.salts else {}
        running = server.stream(CASE.prompt, max_tokens=self.total, **CASE.params, **salt)
        running.wait(5)
        shutil.rmtree(root_of(store))
        root_of(store).write_text("not a directory")
        for path, body in (
            (SNAPSHOT, {"request_id": running.id}),
            (SNAPSHOT, {"name": "all"}),
            (CHECKOUT, {"cid": past.cid}),
            (FORK, {"cid": past.cid}),
        ):
            error_of(server.http.post(path, json=body), 503, "store")
        error_of(server.http.get(SNAPSHOTS), 503, "store")
        assert_same(running.result().steps[:MORE], past.whole.steps[:MORE])
