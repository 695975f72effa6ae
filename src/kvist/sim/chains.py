"""Chains: the full engine blocks of every prompt of a trace, as numbers that are equal where the prefixes are.

A trace says what a prompt holds in blocks of its own size (Mooncake: 512 tokens); an engine has blocks of another. The
tokens of trace block ``i`` are its id, repeated (so NVIDIA Dynamo makes them); both then are prefixes of one list
of tokens, and two engine blocks are the same iff these lists agree up to the block's end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvist.errors import InvalidInput
from kvist.sim.trace import Ints, Trace


@dataclass(frozen=True, slots=True, eq=False)
class Chains:
    """Content ids of full blocks. The arrays are read-only.

    Attributes:
        ids: of all requests one after the other; 0 to ``count - 1``, and each of these occurs.
        offsets: request ``r`` has ``ids[offsets[r]:offsets[r + 1]]``; one longer than there are requests.
        count: how many different blocks there are.
    """

    ids: Ints
    offsets: Ints
    count: int

    def of(self, request: int) -> Ints:
        """Content ids of the full blocks of one prompt."""
        return self.ids[self.offsets[request] : self.offsets[request + 1]]


def chains(trace: Trace, block_size: int) -> Chains:
    """Number the full engine blocks of every prompt; what is left of a prompt has no number.

    Args:
        trace: the requests.
        block_size: tokens of one engine block, 1 or more; any, whatever the trace's is.

    Raises:
        InvalidInput: the block size is less than 1.
    """
    if block_size < 1:
        raise InvalidInput(f"block_size: expected 1 or more, got {block_size}")
    full = trace.input_tokens // block_size
    held = -(-trace.input_tokens // trace.block_size)  # trace blocks that the prompt reaches into
    node, depth = _prefixes(trace, held)
    owner = np.repeat(np.arange(len(trace)), held)
    # of each trace block: how many engine blocks end inside it, by the prompt's length
    ended = np.minimum(depth * trace.block_size // block_size, full[owner])
    ended_before = np.minimum((depth - 1) * trace.block_size // block_size, full[owner])
    ends = ended - ended_before
    most = np.zeros(int(node.max(initial=-1)) + 1, np.int64)
    np.maximum.at(most, node, ends)
    first = np.cumsum(most) - most
    # block j of a request is the first of its node, and as many on as blocks of this request ended there before it
    offsets = _offsets(full)
    position = np.arange(int(offsets[-1])) - np.repeat(offsets[:-1], full)
    ids = np.repeat(first[node] - ended_before, ends) + position
    ids.flags.writeable = offsets.flags.writeable = False
    return Chains(ids, offsets, int(most.sum()))


def _prefixes(trace: Trace, held: Ints) -> tuple[Ints, Ints]:
    """Of the first `held` trace blocks of each request: the prefix that ends there, as a number, and its blocks.

    Goes through all requests block by block, as far as others share a prefix with them; what is after is their own.
    """
    starts = _offsets(held)
    depth = np.arange(int(starts[-1])) - np.repeat(starts[:-1], held) + 1
    node = np.full(len(depth), -1)
    content = trace.block_ids
    if int(content.max(initial=0)) >= 2**31:  # too large to make one number of two
        content = np.unique(content, return_inverse=True)[1]
    contents = int(content.max(initial=0)) + 1
    shared = np.arange(len(trace))  # requests that have a next block, and whose prefix another request has too
    parent = np.zeros(len(trace), np.int64)
    count = level = 0
    while len(shared):
        here = content[trace.offsets[shared] + level]
        _, number, times = np.unique(parent * contents + here, return_inverse=True, return_counts=True)
        node[starts[shared] + level] = parent = count + number
        count += len(times)
        level += 1
        goes_on = (times[number] > 1) & (held[shared] > level)
        shared, parent = shared[goes_on], parent[goes_on]
    own = np.flatnonzero(node < 0)
    node[own] = count + np.arange(len(own))
    return node, depth


def _offsets(lengths: Ints) -> Ints:
    return np.concatenate(([0], np.cumsum(lengths)))
