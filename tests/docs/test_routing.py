"""The code of docs/guides/routing.md runs, from the first block to the last."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "routing.md").read_text()


def test_the_python_code() -> None:
    code = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(code) == 4
    exec(compile("\n".join(code), "routing.md", "exec"), {})
