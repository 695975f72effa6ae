"""Carry: what of a sequence goes on in another layout, perhaps in another engine, and what is said of the rest.

Knows the keys of a sequence's state that engines share. Must not know pages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from kvist.hashing import sha256_cid
from kvist.layout import Layout
from kvist.repo.manifest import LogicalSeq, canonical_json

CONVERTED: Final = "converted"
"""Key of a manifest's numerics: fingerprints of the layouts that its pages had before, first to last. No engine has it
among its own, so a checkout of such pages is never called bit-exact, and no capture takes them for its own."""

NOT_CARRIED: Final = "not_carried"
"""Key of a sequence's state: texts, each naming something that does not go on as if it had never stopped."""

NUMERICS: Final = "numerics"
"""Key of a sequence's state: a digest of the numerics under which its first pages were computed, where these were not
the engine's own. An engine that finds pages by their tokens must not give them to any other sequence."""

_KEPT: Final = frozenset(
    {"sampling", "prompt_tokens", "finished", "cartridge", "kvist_cartridge", "salt", NOT_CARRIED, NUMERICS}
)
"""What every engine reads alike, or leaves alone. A salt and a cartridge say whose a sequence is: they must stay."""

_DRAWS: Final = "its draws start anew: the generator's state is its engine's own"


def carry(seq: LogicalSeq) -> tuple[dict[str, Any], list[str]]:
    """The state with which a sequence goes on, and what of the old one does not.

    Token ids, cached tokens and sampling parameters go on. The state of a generator is meaningful to one kind of
    engine only, and a layout does not say of which kind an engine is.
    """
    state = {name: value for name, value in seq.state.items() if name in _KEPT}
    lost = [_DRAWS] if _draws(seq.state) else []
    unknown = sorted(seq.state.keys() - _KEPT - {"rng", "draws"})
    lost += [f"{name}: what it means is known to its engine only" for name in unknown]
    known = [text for text in _texts(state.get(NOT_CARRIED)) if text not in lost]
    return (state | {NOT_CARRIED: [*known, *lost]} if lost else state), lost


def _draws(state: Mapping[str, Any]) -> bool:
    """Whether a generator has drawn for the sequence, and would draw on."""
    sampling = state.get("sampling")
    is_greedy = isinstance(sampling, Mapping) and not sampling.get("temperature", 1.0)
    return bool(state.get("rng") or state.get("draws")) and not is_greedy


def numerics(source: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Of converted pages: those of the engine that computed them, and through which layouts they went.

    Args:
        source: of the pages before.
        layout: that they had.
    """
    return {**source, CONVERTED: [*_texts(source.get(CONVERTED)), layout.fingerprint]}


def apart(seq: LogicalSeq, numerics: Mapping[str, Any]) -> LogicalSeq:
    """A sequence whose pages were computed under these numerics, for an engine of others; its state says so."""
    told = {"numerics": dict(numerics), "before": seq.state.get(NUMERICS)}
    return dataclasses.replace(seq, state=seq.state | {NUMERICS: sha256_cid(canonical_json(told))})


def _texts(value: object) -> list[str]:
    """A list of texts out of a state or numerics, which anybody may have written; anything else counts as none."""
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []
