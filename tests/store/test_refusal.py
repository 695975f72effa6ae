import pytest

from kvist.errors import StoreError, StoreFull
from kvist.store.location import Location
from kvist.store.refusal import Refusal

HERE = Location.parse("s3://bucket/p?endpoint=http://h:1", {})


def text(status: str, body: str = "") -> str:
    """As object_store 0.14 writes them."""
    return (
        "Generic S3 error: Error performing PUT http://h:1/bucket/p/a?X-Amz-Signature=5ecret0f5ecrets in 1.2ms - "
        f"Server returned non-2xx status code: {status}: {body}\n\nDebug source:\nGeneric {{ key: 5ecret0f5ecrets }}"
    )


def told(message: str, **environ: str) -> Refusal:
    return Refusal.read(Exception(message), environ)


def test_it_tells_status_code_and_one_line_without_secrets() -> None:
    refusal = told(text("503 Slow Down", "<Error><Code>SlowDown</Code><Message>5ecret0f5ecrets</Message></Error>"))
    assert (refusal.status, refusal.code) == (503, "SlowDown")
    assert refusal.message == (
        "the server answered 503 SlowDown (Generic S3 error: Error performing PUT http://h:1/bucket/p/a in 1.2ms)"
    )


def test_values_of_secret_variables_are_blotted_out() -> None:
    refusal = told(
        "cannot parse 5ecret0f5ecrets, b", AZURE_STORAGE_ACCOUNT_KEY="5ecret0f5ecrets", AWS_REGION="cannot p"
    )
    assert refusal.message == "cannot parse ***, b"


@pytest.mark.parametrize(
    ("message", "kind", "says"),
    [
        (text("403 Forbidden", "<Code>SignatureDoesNotMatch</Code>"), StoreError, "access was refused"),
        (text("401 Unauthorized"), StoreError, "access was refused"),
        (text("507 Insufficient Storage"), StoreFull, "507"),
        (text("400 Bad Request", "<Code>QuotaExceeded</Code>"), StoreFull, "QuotaExceeded"),
        (text("404 Not Found", "<Code>NoSuchBucket</Code>"), StoreError, "there is no bucket bucket"),
        (
            text("500 Internal"),
            StoreError,
            "cannot write a in s3://bucket/p?endpoint=http://h:1: the server answered 500",
        ),
        (
            "Error performing GET http://169.254.169.254/latest in 1s - timed out",
            StoreError,
            "no credentials were found",
        ),
        ("HTTP error: connection refused", StoreError, "connection refused"),
    ],
)
def test_the_typed_error(message: str, kind: type[StoreError], says: str) -> None:
    error = told(message).error("write a", HERE)
    assert type(error) is kind
    assert says in str(error)
    assert "5ecret" not in f"{error} {error.hint}"


def test_a_read_from_past_the_end() -> None:
    assert told(text("416 Range Not Satisfiable")).is_past_end
    assert told("Generic error: Wanted range starting at 10, but object was only 10 bytes long").is_past_end
    assert not told(text("400 Bad Request")).is_past_end
