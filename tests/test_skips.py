"""Where ``KVIST_CI`` is set, a test that is skipped for want of a tool fails the run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TEST = "import pytest\ndef test_it(): pytest.skip('needs chromium')"
MODULE = "import pytest\npytest.importorskip('no_such_module')"
EXPECTED = "import pytest\ndef test_it(): pytest.skip('vLLM is not installed')"


@pytest.mark.parametrize(
    ("source", "options", "variables", "code"),
    [
        (TEST, [], {"KVIST_CI": "1"}, 1),
        (MODULE, ["-n", "1"], {"KVIST_CI": "1"}, 1),
        (EXPECTED, [], {"KVIST_CI": "1"}, 0),
        (TEST, [], {}, 0),
    ],
    ids=["a test", "a module, xdist", "expected", "elsewhere"],
)
def test_a_skip(source: str, options: list[str], variables: dict[str, str], code: int, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(f"{source}\n\n\ndef test_that():\n    pass\n")
    (tmp_path / "test_other.py").write_text("def test_other():\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", *options, str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "KVIST_CI"}
    environment |= {"PYTHONPATH": str(Path(__file__).parent)} | variables
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == code, ran.stdout + ran.stderr
    assert ("skipped without leave" in ran.stdout) == (code == 1)
