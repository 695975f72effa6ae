"""NVIDIA Dynamo's KV-routed replay of a trace by 8 workers. Runs under another interpreter, which has no kvist.

Argument: a file. Prints a JSON array: of each request its arrival, lengths, worker and last token.
"""

import json
import os
import sys

os.environ["DYN_LOG"] = "error"

from dynamo._core import _normalize_mocker_config, run_mocker_trace_replay

FIELDS = ("arrival_time_ms", "input_length", "requested_output_length", "decode_worker_idx", "last_token_ms")

if __name__ == "__main__":
    report = run_mocker_trace_replay(
        [sys.argv[1]],
        extra_engine_args=_normalize_mocker_config({"engine": {"num_gpu_blocks": 16384, "block_size": 64}}),
        num_workers=8,
        router_mode="kv_router",
        replay_mode="offline",
        trace_format="mooncake",
        trace_block_size=512,
        capture_per_request=True,
    )
    print(json.dumps([[request[field] for field in FIELDS] for request in report.per_request]))
