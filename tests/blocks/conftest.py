from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kvist.blocks import BlockManager

pytest.register_assert_rewrite("kvist.testing.policy", "kvist.testing.blocks")


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every manager that the test made is whole at its end."""
    made: list[BlockManager] = []
    init = BlockManager.__init__

    def noted(self: BlockManager, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(BlockManager, "__init__", noted)
    yield
    assert made
    for manager in made:
        manager.check_integrity()
