"""`--tier` and ``KVIST_TIERS``."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvist.cli.invocation import Invocation, common, common_of_root
from kvist.errors import InvalidInput
from kvist.repo import Repository


@pytest.mark.parametrize(
    ("words", "environment", "expected"),
    [
        ([], "", ()),
        ([], "one two", ("one", "two")),
        (["--tier", "three"], "one two", ("three",)),
        (["--tier", "three", "sub", "--tier", "four", "--tier", "five"], "", ("four", "five")),
        (["sub"], "one", ("one",)),
    ],
)
def test_what_is_typed_last_counts(
    words: list[str], environment: str, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    import click

    monkeypatch.setenv("KVIST_TIERS", environment)
    seen: list[Invocation] = []

    @click.group(invoke_without_command=True)
    @common_of_root
    def root(run: Invocation) -> None:
        seen.append(run)

    @root.command()
    @common
    def sub(run: Invocation) -> None:
        seen.append(run)

    root.main(words, standalone_mode=False, obj=Invocation())
    assert seen[-1].tiers == expected


def test_a_repository_is_opened_with_them(tmp_path: Path) -> None:
    Repository.init((tmp_path / "store").as_uri()).close()
    run = Invocation()
    run.store, run.tiers = (tmp_path / "store").as_uri(), (f"file://{tmp_path}/tier?max_bytes=1MB",)
    with run.open() as repo:
        assert [stats.url for stats in repo.pages.tier_stats()] == [f"file://{tmp_path}/tier?max_bytes=1000000"]
    run.tiers = ("nfs://host",)
    with pytest.raises(InvalidInput, match="starts with 'nfs'"):
        run.open()
