"""Runs where ai-dynamo is: reads one JSON command a line, drives a RadixTree, writes one JSON answer a line."""

import json
import sys

from dynamo._core import RadixTree

tree = RadixTree()
for line in sys.stdin:
    command = json.loads(line)
    answer = None
    if command["do"] == "reset":
        tree = RadixTree()
    elif command["do"] == "apply":
        try:
            tree.apply_event(command["worker"], json.dumps(command["event"]).encode())
        except RuntimeError as error:
            answer = str(error)
    elif command["do"] == "remove_worker":
        tree.remove_worker(command["worker"])
    else:
        scores = tree.find_matches(command["prompt"]).scores
        answer = sorted([worker, rank, depth] for (worker, rank), depth in scores.items())
    print(json.dumps(answer), flush=True)
