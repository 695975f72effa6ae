"""What keeps a server of SGLang with kvist from starting: named, and never a server without kvist in its place."""

from __future__ import annotations

from pathlib import Path

import pytest
from sglang_servers import needs_server, serve

from kvist.errors import EngineError
from kvist.testing.models import make_shape

pytestmark = [needs_server, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shape(tmp_path_factory.mktemp("models") / "tiny", "tiny")


@pytest.mark.parametrize(
    ("options", "settings", "named"),
    [
        (("--disable-radix-cache",), {}, "does not support --disable-radix-cache in SGLang"),
        (("--tokenizer-worker-num", "2"), {}, "does not support several tokenizer workers in SGLang"),
        ((), {"stores": "x"}, "KVIST_SGLANG: expected a JSON object"),
    ],
    ids=["no prefix cache", "tokenizers", "settings"],
)
def test_refused_at_start(
    options: tuple[str, ...], settings: dict[str, str], named: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match=named):
        serve(model, (tmp_path / "store").as_uri(), *options, settings=settings).kill()
