"""NVIDIA Dynamo's replay of trace files. Runs under another interpreter, which has dynamo and not kvist.

Arguments: files. Prints one JSON array: of each file its requests, or the message of the error.
"""

import json
import sys
from typing import Any

from dynamo._core import _normalize_mocker_config, run_mocker_trace_replay

FIELDS = ("input_length", "arrival_time_ms", "first_admit_ms", "last_token_ms", "terminal_status")
ONE_SEAT = _normalize_mocker_config({"engine": {"num_gpu_blocks": 16384, "block_size": 64, "max_num_seqs": 1}})


def replay(path: str) -> Any:
    try:
        report = run_mocker_trace_replay(
            [path],
            extra_engine_args=ONE_SEAT,
            num_workers=1,
            router_mode="round_robin",
            replay_mode="offline",
            trace_format="mooncake",
            trace_block_size=512,
            capture_per_request=True,
        )
    except Exception as error:
        return str(error)
    return [{field: request.get(field) for field in FIELDS} for request in report.per_request]


if __name__ == "__main__":
    print(json.dumps([replay(path) for path in sys.argv[1:]]))
