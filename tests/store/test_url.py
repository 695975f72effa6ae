from pathlib import Path

import pytest

from kvist.errors import InvalidInput
from kvist.store import LocalStore, MemoryStore, PrefixStore, ReadOnlyStore, open_store


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


def test_buckets_and_web_servers_are_opened_without_being_touched() -> None:
    pytest.importorskip("obstore")
    assert open_store("s3://bucket/a/").url == "s3://bucket/a"
    assert open_store("GS://bucket").url == "gs://bucket"
    assert open_store("az://container/x?account=me").url == "az://container/x?account=me"
    assert isinstance(open_store("https://host/repo"), ReadOnlyStore)
    assert open_store("s3://b/tenants/a?region=eu-north-1") == PrefixStore(
        open_store("s3://b?region=eu-north-1"), "tenants/a"
    )


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
        ("s3://", "expected s3://BUCKET/PREFIX"),
        ("https://", "expected https://HOST/PATH"),
        ("s3://bucket?secret=1", "never carries a secret"),
        ("ftp://host/x", "unknown scheme: expected file:///absolute/path, a path, memory:, s3://"),
        ("c:dir", "unknown scheme"),
        ("oci:/layout:v1/tenants/a", "without another ':'"),
        ("oci:a:b:v1", "without another ':'"),
        ("/a\0b", "no zero bytes"),
        ("file:///a%00b", "no zero bytes"),
        ("oci:/a\0:t", "no zero bytes"),
        ("s3://bucket/a\0", "no zero bytes"),
    ],
)
def test_what_it_refuses(url: str, says: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        open_store(url)
    assert says in str(caught.value)
