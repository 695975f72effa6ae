"""What users call a snapshot. Knows cids, their first digits, and refs; must not know what a snapshot holds."""

from __future__ import annotations

from typing import Final

from kvist.errors import InvalidInput, NotFound
from kvist.repo.objects import Objects, snapshot_key
from kvist.repo.refs import Ref, RefKind, Refs

_PREFIX_MIN: Final = 6


def find(objects: Objects, refs: Refs, rev: str) -> tuple[str, list[Ref]]:
    """The cid that ``rev`` names, and the refs that are called so; see `Repository.resolve`."""
    digits = rev.removeprefix("sha256:")
    is_hex = bool(digits) and all(c in "0123456789abcdef" for c in digits)
    if is_hex and len(digits) == 64:
        cid = f"sha256:{digits}"
        if not objects.has(snapshot_key(cid)):
            raise NotFound(f"there is no snapshot {cid}")
        return cid, []
    named: list[Ref] = []
    if digits == rev:
        named = [ref for kind in RefKind if (ref := refs.read(kind, rev)) is not None]
    found = {f"{ref.kind.noun} {rev}": ref.cid for ref in named}
    if not found and is_hex and len(digits) >= _PREFIX_MIN:
        found = {cid: cid for cid, _ in objects.snapshots() if cid.startswith(f"sha256:{digits}")}
    if not found:
        raise NotFound(f"no snapshot, branch or tag is called {rev!r}", hint="kvist log")
    if len(set(found.values())) > 1:
        raise InvalidInput(f"{rev!r} is ambiguous: {', '.join(f'{k} ({v})' for k, v in sorted(found.items()))}")
    return next(iter(found.values())), named
