"""Makes ``sglang.json``: what Dynamo 1.6.1's SGLang-like mocker makes of ``trace.jsonl``; run it as ``make.py``."""

from __future__ import annotations

import json
from typing import Any

from make import HERE, replay

PAGES = {"scheduling": "sglang", "num_blocks": 96, "block_size": 64}
SMALL = PAGES | {"num_blocks": 84}
HOPE = {"schedule_conservativeness": 0.1}  # admits more than can run, so that some are retracted
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ample": (PAGES | {"num_blocks": 4096}, {}),
    "small pool": (SMALL, {}),
    "small pool, hopeful": (SMALL | {"sglang": HOPE}, {}),
    "longest prefix first": (SMALL | {"sglang": {"schedule_policy": "lpm"}}, {}),
    "longest prefix first, hopeful": (SMALL | {"sglang": HOPE | {"schedule_policy": "lpm"}}, {}),
    "pages of 16": (PAGES | {"num_blocks": 336, "block_size": 16, "sglang": HOPE}, {}),
    "pages of 1": (PAGES | {"num_blocks": 5360, "block_size": 1, "sglang": HOPE | {"schedule_policy": "lpm"}}, {}),
    "no cache": (SMALL | {"prefix_caching": False, "sglang": HOPE}, {}),
    "small chunks": (SMALL | {"sglang": {"chunked_prefill_size": 256}}, {}),
    "few prompt tokens": (PAGES | {"sglang": {"chunked_prefill_size": 512, "max_prefill_tokens": 512}}, {}),
    "clipped": (SMALL | {"sglang": {"clip_max_new_tokens": 20}}, {}),
    "few seats": (PAGES | {"max_num_seqs": 3}, {}),
    "shortest model": (PAGES | {"max_model_len": 1100}, {}),
    "closed loop": (PAGES, {"concurrency": 8}),
    "3 workers": (SMALL, {"workers": 3}),
    "faster engine": (PAGES | {"speedup": 3.0, "decode_speedup": 1.5}, {}),
}

if __name__ == "__main__":
    made = {name: {"engine": e, "cluster": c, "requests": replay(e, c)} for name, (e, c) in CASES.items()}
    lines = (f"{json.dumps(name)}:{json.dumps(case, separators=(',', ':'))}" for name, case in made.items())
    (HERE / "sglang.json").write_text("{" + ",\n".join(lines) + "}\n")
