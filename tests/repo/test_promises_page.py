"""docs/promises.md names tests that exist, and an operation for each that is tested."""

import ast
import re
from pathlib import Path

import pytest

from .operations import OPERATIONS

TESTS = Path(__file__).parent.parent
PAGE = (TESTS.parent / "docs" / "promises.md").read_text()
NAMED = sorted(set(re.findall(r"`((?:repo|server|cli|store)/test_\w+\.py)(?:::(test_\w+))?`", PAGE)))


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_each_test_that_it_names_exists(file: str, test: str) -> None:
    tree = ast.parse((TESTS / file).read_text())
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert not test or test in functions


def test_every_row_names_its_proof() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and line.count("|") == 7]
    assert len(rows) > 15
    for row in rows[2:]:
        assert re.search(r"`\w+/test_\w+\.py", row.split("|")[-2]), row


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_has_a_row(name: str) -> None:
    first = [line.split("|")[1].lower() for line in PAGE.splitlines() if line.startswith("| ")]
    words = {"mend": "mend a ref", "delete a branch": "delete a ref", "delete a tag": "delete a ref"}
    word = re.split(" on | in | without | --", words.get(name, name))[0]
    assert any(word in row for row in first)


def test_its_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code, {})
    assert re.search(r"^\d+ calls, \d+ faults$", capsys.readouterr().out, re.MULTILINE)
