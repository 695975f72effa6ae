"""Whose a field of ``kv_transfer_params`` is. One that nobody reads is refused: it may be a misspelt cartridge.

vLLM hands the object to all of its connectors and itself looks at few of its fields, so that what is misspelt, or meant
for another server, is passed over. A request that says such a thing would begin with another cartridge, or with none.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from kvist.cartridge.routing import ID_KEY, Selection
from kvist.errors import InvalidInput

PREFIX_KEY: Final = "cartridge_prefix"
"""The field that overrides the configuration's ``prefix``."""
_OTHERS: Final = frozenset(
    (
        # vLLM's own connectors and servers, 0.28 to 0.32, beside those that begin as below
        *("transfer_id", "transfer_mode", "tp_size", "pp_size", "dcp_size", "is_request_leader", "_p_side_truncated"),
        *("disagg_spec", "ret_first_tok", "prompt_token_ids", "hidden_states_path", "include_output_tokens"),
        *("max_load_tokens", "max_offload_tokens", "kv_load_tiers", "_remote_blocks_processed", "cached_token_stats"),
        *("num_lmcache_cached_tokens", "num_lmcache_extra_cached_tokens"),
        # `KvistConnector`
        *("snapshot", "sequence"),
    )
)
_BEGINNINGS: Final = ("do_remote_", "remote_", "lmcache.")
_OURS: Final = "cartridge"


def check_fields(extra_args: Mapping[str, Any] | None, keys: Collection[str], others: Collection[str]) -> None:
    """Refuse a request with a field that nobody reads, or that begins as ours and is none.

    What stands beside ``kv_transfer_params`` (``vllm_xargs`` in a body) is open to everybody: there, only what begins
    as ours is looked at. A field that is null says nothing.

    Args:
        extra_args: of the sampling parameters, ``kv_transfer_params`` among them.
        keys: that the router goes by.
        others: further fields that other connectors read.

    Raises:
        InvalidInput: there is such a field.
    """
    extra = extra_args or {}
    known = {*keys, ID_KEY, PREFIX_KEY}
    for name, value in (extra.get("kv_transfer_params") or {}).items():
        if value is not None and name not in known and not _is_of_others(str(name), others):
            raise _unread(f"kv_transfer_params.{name}", keys)
    for name, value in extra.items():
        if value is not None and str(name).startswith(_OURS) and name not in known:
            raise _unread(str(name), keys)


def wanted_mode(extra_args: Mapping[str, Any] | None) -> str | None:
    """What a request says under `PREFIX_KEY`; ``None``: nothing.

    Raises:
        InvalidInput: it has the wrong type.
    """
    return Selection((extra_args or {}).get("kv_transfer_params"), extra_args).value(PREFIX_KEY)


def _is_of_others(name: str, others: Collection[str]) -> bool:
    return name in _OTHERS or name in others or name.startswith(_BEGINNINGS)


def _unread(name: str, keys: Collection[str]) -> InvalidInput:
    goes_by = ", ".join(sorted(keys)) or "nothing that a request says"
    return InvalidInput(
        f"{name:.120}: nobody reads this field; which cartridge a request uses goes by {goes_by}",
        hint='if another connector reads it, name it in "other_params" of kv_connector_extra_config',
    )
