"""The guide to vLLM, as far as no vLLM is needed to check it. `tests/vllm/test_guide.py` runs its commands."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_guide_names_every_option() -> None:
    module = ast.parse((ROOT / "src/kvist/engines/vllm/connector.py").read_text())
    sets = {
        node.target.id: node.value
        for node in module.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    texts = [sets[name] for name in ("_TEXTS", "_OPTIONS")]
    options = {item.value for each in texts for item in ast.walk(each) if isinstance(item, ast.Constant)}
    assert len(options) == 9
    table = (ROOT / "docs/guides/vllm.md").read_text().partition("## Options")[2].partition("\n## ")[0]
    assert [name for name in sorted(options) if f"`{name}`" not in table] == []
