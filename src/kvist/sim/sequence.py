"""`ActiveSequence`: the blocks of one request as it is prefilled, generates, is preempted and ends.

Makes moves, and never sees what becomes of them: whoever carries them out says what was allocated. No clock; all that
is random comes from the generator that is passed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from uuid import UUID

from kvist.blocks.moves import Deref, FullBlock, LineageEntry, Move, PartialBlock, Promote, UniqueBlock, Use
from kvist.errors import Conflict, InvalidInput
from kvist.hashing import local_block_hashes, sequence_hashes

VOCABULARY = 1 << 16
"""Generated tokens that nobody chose are below this."""


class ActiveSequence:
    """One request. Its full blocks come first, then at most one partial block, which holds the last tokens.

    A block that its last token has filled stays partial until the next token comes: it is promoted by the move that
    also opens the next block. The rules are those of NVIDIA Dynamo's mocker; but all errors are typed.

    Args:
        tokens: the prompt, 1 token or more.
        max_output_tokens: how many it generates, 1 or more.
        block_size: tokens in a block, 2 or more.
        enable_prefix_caching: whether its blocks are named by their tokens, so that others share them. If not, each
            has a random name for the life of the sequence: after a preemption it finds its own blocks, and no others.
        with_token_ids: whether moves carry the tokens of full blocks. Never without prefix caching.
        rng: for the names of partial blocks, of blocks without prefix caching, and for generated tokens. Sequences of
            one pool share one, or their names would be the same.

    Raises:
        InvalidInput: one of these cannot be right.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        max_output_tokens: int,
        block_size: int = 64,
        enable_prefix_caching: bool = True,
        *,
        with_token_ids: bool = False,
        rng: Random,
    ) -> None:
        if not tokens:
            raise InvalidInput("a sequence needs a prompt of 1 token or more")
        for token in tokens:
            _require_token(token)
        if max_output_tokens < 1 or block_size < 2:
            raise InvalidInput(
                f"max_output_tokens must be 1 or more, block_size 2 or more, not {max_output_tokens} and {block_size}"
            )
        self._block_size = block_size
        self._max_output_tokens = max_output_tokens
        self._caching = enable_prefix_caching
        self._with_token_ids = with_token_ids and enable_prefix_caching
        self._rng = rng
        self._tokens = list(tokens)
        self._num_input = len(tokens)
        self._allocated = 0  # tokens
        self._local_hashes = local_block_hashes(self._tokens, block_size) if enable_prefix_caching else []
        names = (
            sequence_hashes(self._local_hashes)
            if enable_prefix_caching
            else [rng.getrandbits(64) for _ in range(len(tokens) // block_size)]
        )
        self._blocks: list[UniqueBlock] = [FullBlock(name) for name in names]
        if len(tokens) % block_size:
            self._blocks.append(self._partial())

    def __len__(self) -> int:
        """How many tokens it has, prompt and generated."""
        return len(self._tokens)

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self._block_size

    @property
    def unique_blocks(self) -> Sequence[UniqueBlock]:
        """Its blocks, the root first."""
        return tuple(self._blocks)

    @property
    def local_hashes(self) -> Sequence[int]:
        """Local hash of each full block; none without prefix caching."""
        return tuple(self._local_hashes)

    @property
    def lineage(self) -> Sequence[LineageEntry]:
        """Empty: its blocks are matched by their sequence hashes."""
        return ()

    @property
    def enable_prefix_caching(self) -> bool:
        """Whether others may share its blocks."""
        return self._caching

    @property
    def token_ids(self) -> Sequence[int]:
        """Its tokens, prompt and generated."""
        return tuple(self._tokens)

    @property
    def num_input_tokens(self) -> int:
        """Length of the prompt."""
        return self._num_input

    @property
    def max_output_tokens(self) -> int:
        """How many tokens it generates."""
        return self._max_output_tokens

    @property
    def generated_tokens(self) -> int:
        """How many tokens it has generated."""
        return len(self._tokens) - self._num_input

    @property
    def is_done(self) -> bool:
        """Whether it has generated all its tokens."""
        return self.generated_tokens >= self._max_output_tokens

    @property
    def num_allocated_tokens(self) -> int:
        """How many leading tokens have blocks."""
        return self._allocated

    @property
    def blocks_to_completion(self) -> int:
        """How many blocks it has when it is done."""
        return self._blocks_of(self._num_input + self._max_output_tokens)

    def prepare_allocation(self, tokens: int) -> Use | None:
        """The move that gives blocks to the leading ``tokens`` tokens, as far as they have none.

        Returns:
            ``None`` if no further block is needed.

        Raises:
            InvalidInput: the sequence has fewer tokens.
        """
        self._require_tokens(tokens)
        first, end = self._blocks_of(self._allocated), self._blocks_of(tokens)
        if end <= first:
            return None
        blocks = self._blocks[first:end]
        full = sum(isinstance(block, FullBlock) for block in blocks)
        return Use(
            blocks=blocks,
            local_hashes=self._local_hashes[first : first + full],
            token_ids=[self._tokens_of(index) for index in range(first, first + full)]
            if self._with_token_ids
            else None,
            parent=self._blocks[first - 1] if first else None,
        )

    def commit_allocation(self, tokens: int) -> None:
        """The leading ``tokens`` tokens have blocks now.

        Raises:
            InvalidInput: the sequence has fewer tokens, or more of them had blocks already.
        """
        self._require_tokens(tokens)
        if tokens < self._allocated:
            raise InvalidInput(f"{self._allocated} tokens have blocks, which is more than {tokens}")
        self._allocated = tokens

    def take_creation_signal(self) -> Use | None:
        """`prepare_allocation` and `commit_allocation` of all it has."""
        move = self.prepare_allocation(len(self._tokens))
        self._allocated = len(self._tokens)
        return move

    def push(self, token: int) -> list[Move]:
        """One more token.

        Returns:
            What it takes: nothing, or a Promote of the block that is full and a Use of the next one. When that Use is
            refused, `pop` undoes the token, but not the Promote.

        Raises:
            InvalidInput: it is no token.
        """
        _require_token(token)
        self._tokens.append(token)
        if len(self._tokens) % self._block_size != 1:
            return []
        moves: list[Move] = []
        if self._blocks and isinstance(last := self._blocks[-1], PartialBlock):
            moves.append(self._promote(last))
        self._blocks.append(self._partial())
        moves.append(Use(blocks=[self._blocks[-1]], parent=self._blocks[-2] if len(self._blocks) > 1 else None))
        return moves

    def generate(self, token: int | None = None) -> list[Move]:
        """One more generated token.

        Args:
            token: which; a random one if ``None``.

        Returns:
            As `push`; if it is the last token, then also that of `reset_with_signal`, for all blocks.

        Raises:
            Conflict: it is done.
            InvalidInput: it is no token.
        """
        if self.is_done:
            raise Conflict(f"the sequence has generated all its {self._max_output_tokens} tokens")
        moves = self.push(self._rng.randrange(VOCABULARY) if token is None else token)
        if self.is_done:
            self._allocated = len(self._tokens)
            moves += self.reset_with_signal()
        return moves

    def pop(self) -> None:
        """Undo the last generated token, and the block that it opened. The block before it stays full.

        Raises:
            Conflict: nothing was generated, or the token is in a block that was promoted: its name says so.
        """
        if not self.generated_tokens:
            raise Conflict("the sequence has generated nothing")
        if isinstance(self._blocks[-1], FullBlock):
            raise Conflict("the last token is in a full block, which was promoted")
        if len(self._tokens) % self._block_size == 1:
            del self._blocks[-1]
        del self._tokens[-1]
        self._allocated = min(self._allocated, len(self._tokens))

    def free_signal(self) -> list[Move]:
        """The move that gives back the blocks that are allocated, the last first; none if there are none."""
        blocks = self._blocks[: self._blocks_of(self._allocated)]
        return [Deref(blocks[::-1])] if blocks else []

    def reset_with_signal(self) -> list[Move]:
        """Preempt it: `free_signal`, and then nothing is allocated. It keeps its tokens and the names of its blocks."""
        moves = self.free_signal()
        self._allocated = 0
        return moves

    def _blocks_of(self, tokens: int) -> int:
        return -(-tokens // self._block_size)

    def _require_tokens(self, tokens: int) -> None:
        if not 0 <= tokens <= len(self._tokens):
            raise InvalidInput(f"the sequence has {len(self._tokens)} tokens, not {tokens}")

    def _tokens_of(self, index: int) -> list[int]:
        return self._tokens[index * self._block_size : (index + 1) * self._block_size]

    def _partial(self) -> PartialBlock:
        return PartialBlock(UUID(int=self._rng.getrandbits(128), version=4))

    def _promote(self, partial: PartialBlock) -> Promote:
        """The last block is full."""
        index = len(self._blocks) - 1
        before = self._blocks[index - 1] if index else None
        assert before is None or isinstance(before, FullBlock)
        parent = None if before is None else before.sequence_hash
        tokens = self._tokens_of(index)
        local_hash = 0
        if self._caching:
            (local_hash,) = local_block_hashes(tokens, self._block_size)
            (name,) = sequence_hashes([local_hash], parent=parent)
            self._local_hashes.append(local_hash)
        else:
            name = self._rng.getrandbits(64)
        self._blocks[index] = FullBlock(name)
        return Promote(
            uuid=partial.uuid,
            sequence_hash=name,
            parent_hash=parent,
            local_hash=local_hash,
            token_ids=tokens if self._with_token_ids else None,
        )


def _require_token(token: object) -> None:
    if type(token) is not int or not 0 <= token < 1 << 32:
        raise InvalidInput(f"a token must be an integer from 0 to 2**32-1, not {token!r:.80}")
