"""The commands and the code of these guides run, in the order in which a reader meets them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDES = Path(__file__).parents[2] / "docs" / "guides"
SUBJECTS = {"simulate": 7, "plan": 3, "curves": 1}


def blocks(guide: str, language: str) -> list[str]:
    page = (GUIDES / f"{guide}.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("guide", SUBJECTS)
def test_the_guide(guide: str, tmp_path: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    scripts = blocks(guide, "sh")
    assert len(scripts) == SUBJECTS[guide]
    commands = [["bash", "-euo", "pipefail", "-c", script] for script in scripts]
    commands += [[sys.executable, "-c", code] for code in blocks(guide, "python")]
    told = ""
    for command in commands:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"
        told += done.stdout
    for shown in blocks(guide, "text"):
        lines = [line.strip() for line in shown.splitlines() if line.strip() not in ("", "...")]
        missing = [line for line in lines if " ".join(line.split()) not in " ".join(told.split())]
        assert not missing, f"the guide shows what is not told any more: {missing}"
