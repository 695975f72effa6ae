from pathlib import Path

import pytest

from kvist.errors import InvalidInput
from kvist.store import LocalStore, MemoryStore, open_store


def test_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = LocalStore(tmp_path / "a b?c#%41")
    for form in (tmp_path / "a b?c#%41", str(tmp_path / "a b?c#%41"), "a b?c#%41", "./x/../a b?c#%41", expected.url):
        store = open_store(form)
        assert isinstance(store, LocalStore)
        assert store == expected
    assert not [*tmp_path.iterdir()], "opening must not create anything"


def test_file_url(tmp_path: Path) -> None:
    assert open_store(f"file://{tmp_path}").url == f"file://{tmp_path}"
    assert open_store(f"FILE://localhost{tmp_path}?durable=1").url == f"file://{tmp_path}"
    assert open_store(f"file:{tmp_path}?durable=0").url == f"file://{tmp_path}?durable=0"


def test_one_directory_by_two_names_is_one_store(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert open_store(tmp_path / "link") == open_store(tmp_path / "real")


def test_memory_is_always_new() -> None:
    one, two = open_store("memory:"), open_store("memory:")
    assert isinstance(one, MemoryStore)
    assert one != two


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "expected file:"),
        ("file://host/path", "got 'file://host/path'"),
        ("file:relative", "file:///absolute/path"),
        ("file:///a#b", "file:///absolute/path"),
        ("file:///a?durable=2", "durable=0"),
        ("file:///a?sync=0", "durable=0"),
        ("memory:3", "memory: alone"),
        ("s3://bucket/x", "not in this version"),
        ("gs://bucket/x", "not in this version"),
        ("ftp://host/x", "unknown scheme: expected file:///absolute/path, a path, or memory:"),
        ("c:dir", "unknown scheme"),
    ],
)
def test_what_it_refuses(url: str, says: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        open_store(url)
    assert says in str(caught.value)
