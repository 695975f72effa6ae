"""Store: keys to bytes. Knows nothing of KV."""

from __future__ import annotations

from kvist.store.base import Match, ObjectInfo, ObjectWriter, PutMode, Range, Store, check_key, check_prefix
from kvist.store.local import LocalStore
from kvist.store.memory import MemoryStore
from kvist.store.prefix import PrefixStore
from kvist.store.quota import Quota, QuotaStore
from kvist.store.url import open_store
from kvist.store.wrap import DelayedStore, MeteredStore, ReadOnlyStore, Traffic, WrapperStore

__all__ = [
    "DelayedStore",
    "LocalStore",
    "Match",
    "MemoryStore",
    "MeteredStore",
    "ObjectInfo",
    "ObjectWriter",
    "PrefixStore",
    "PutMode",
    "Quota",
    "QuotaStore",
    "Range",
    "ReadOnlyStore",
    "Store",
    "Traffic",
    "WrapperStore",
    "check_key",
    "check_prefix",
    "open_store",
]
