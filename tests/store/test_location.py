import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.errors import InvalidInput
from kvist.store.location import Location

SECRET = "wJalrXUtnFEMI"

names = st.from_regex(r"[a-z0-9][a-z0-9.-]{0,20}", fullmatch=True)
hosts = st.from_regex(r"https?://[a-z0-9.-]{1,20}(:[0-9]{1,5})?", fullmatch=True)
prefixes = st.lists(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+@-]{0,10}", fullmatch=True), max_size=3).map("/".join)


@given(
    st.sampled_from(["s3", "gs", "az"]), names, prefixes, st.none() | hosts, st.none() | st.sampled_from(["eu-north-1"])
)
def test_its_url_opens_it_again(
    scheme: str, bucket: str, prefix: str, endpoint: str | None, region: str | None
) -> None:
    options = (("region", region),) if region and scheme == "s3" else ()
    location = Location(scheme, bucket, prefix, endpoint, options)
    assert Location.parse(location.url, {}) == location


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("s3://bucket", "s3://bucket"),
        ("S3://bucket/", "s3://bucket"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("gcs://b/p", "gs://b/p"),
        ("azure://c/p?account=me", "az://c/p?account=me"),
        ("s3://b?style=virtual&region=eu-north-1", "s3://b?region=eu-north-1&style=virtual"),
        ("s3://b?endpoint=http%3A%2F%2F127.0.0.1%3A9000/", "s3://b?endpoint=http://127.0.0.1:9000"),
        ("https://host:8443/a%20b/repo/", "https://host:8443/a%20b/repo"),
        ("http://[::1]:80/x", "http://[::1]:80/x"),
    ],
)
def test_what_it_takes(url: str, canonical: str) -> None:
    assert Location.parse(url, {}).url == canonical


@pytest.mark.parametrize(
    "url",
    [
        f"s3://key:{SECRET}@bucket/p",
        f"https://me:{SECRET}@host/p",
        f"s3://bucket?endpoint=http://me:{SECRET}@host",
        f"s3://bucket?secret_access_key={SECRET}",
        f"s3://bucket?{SECRET}",
        f"s3://bucket?region={SECRET}%0a",
        f"s3://bucket?endpoint=ftp://{SECRET}",
        f"s3://bucket?endpoint=http://h?{SECRET}",
        f"s3://bucket?region=a&region={SECRET}",
        f"az://c/p?sas={SECRET}",
        f"https://host/p?token={SECRET}",
        f"s3://b#{SECRET}",
        f"s3:///p?region={SECRET}",
    ],
)
def test_secrets_and_what_may_be_one_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Location.parse(url, {})
    assert SECRET not in f"{caught.value} {caught.value.hint} {caught.value.__cause__} {caught.value.__context__}"


@pytest.mark.parametrize(
    "url", ["s3://", "s3://a b/c", "s3:bucket", "s3://bucket/a//b", "s3://bucket/../x", "https://"]
)
def test_what_is_no_place(url: str) -> None:
    with pytest.raises(InvalidInput):
        Location.parse(url, {})


def test_the_endpoint_may_come_from_the_environment() -> None:
    environ = {"AWS_ENDPOINT_URL": "http://a:1", "AWS_ENDPOINT_URL_S3": "http://b:2"}
    assert Location.parse("s3://x", environ).url == "s3://x?endpoint=http://b:2"
    assert Location.parse("s3://x?endpoint=http://c:3", environ).endpoint == "http://c:3"
    assert Location.parse("gs://x", environ).endpoint is None
    with pytest.raises(InvalidInput):
        Location.parse("s3://x", {"AWS_ENDPOINT_URL": f"http://u:{SECRET}@h"})


def test_plain_http_only_where_the_url_says_so() -> None:
    assert Location.parse("s3://b?endpoint=http://h", {}).is_plain
    assert Location.parse("http://h/p", {}).is_plain
    assert not Location.parse("s3://b", {}).is_plain
    assert not Location.parse("s3://b?endpoint=https://h", {}).is_plain
