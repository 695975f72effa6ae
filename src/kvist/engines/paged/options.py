"""Options of a cache tier that keeps its chunks in a repository: what each adapter's own configuration says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from kvist.blocks.policy import POLICIES
from kvist.engines.paged.chunks import Chunks
from kvist.errors import InvalidInput
from kvist.layout import Layout
from kvist.repo.repository import Repository

_GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkOptions:
    """Where chunks are kept, and how many.

    Attributes:
        store: url or path of the repository; made where there is none.
        max_bytes: bound of what is kept, see `kvist.pager.prefix.PrefixCache`. Default 16 GiB.
        policy: which chunks go first when it is reached, of `kvist.blocks.policy.POLICIES`.
        staging_bytes: host memory for chunks on their way to the store. Default 1 GiB.
        revision: what pins the weights; ``None``: found out by the adapter.
        refresh_s: a lookup that misses asks anew, at most so often, what other servers have stored.
    """

    store: str
    max_bytes: int = 16 * _GIB
    policy: str = "lru"
    staging_bytes: int = _GIB
    revision: str | None = None
    refresh_s: float = 5.0

    def __post_init__(self) -> None:
        if not isinstance(self.store, str) or not self.store:
            raise InvalidInput(f"store must be the url or path of a repository, got {self.store!r:.80}")
        for name in ("max_bytes", "staging_bytes"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InvalidInput(f"{name} must be a positive number of bytes, got {value!r:.80}")
        if self.policy not in POLICIES:
            raise InvalidInput(f"policy must be one of {', '.join(POLICIES)}, got {self.policy!r:.80}")
        if self.revision is not None and (not isinstance(self.revision, str) or not self.revision):
            raise InvalidInput(f"revision must be text, got {self.revision!r:.80}")
        if isinstance(self.refresh_s, bool) or not isinstance(self.refresh_s, int | float) or self.refresh_s < 0:
            raise InvalidInput(f"refresh_s must be a number of seconds, got {self.refresh_s!r:.80}")

    def open(self, layout: Layout, **how: Any) -> Chunks:
        """Open the repository and the chunks of ``layout`` in it, the caller's to close.

        Args:
            layout: of their pages.
            how: further arguments of `Chunks`.

        Raises:
            InvalidInput: a bound that no chunk fits.
            KvistError: the repository cannot be opened or read.
        """
        repo = Repository.open(self.store, create=True)
        try:
            return Chunks(
                repo,
                layout,
                max_bytes=self.max_bytes,
                policy=self.policy,
                staging_bytes=self.staging_bytes,
                refresh_s=self.refresh_s,
                **how,
            )
        except BaseException:
            repo.close()
            raise
