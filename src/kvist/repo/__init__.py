"""Repository: content-addressed pages, manifests, snapshots, refs and lineage, in any store. Knows no engine."""

from __future__ import annotations

from kvist.repo.manifest import LogicalSeq, Manifest, PageEntry
from kvist.repo.refs import Ref, RefKind
from kvist.repo.repository import Repository
from kvist.repo.snapshot import Snapshot

__all__ = ["LogicalSeq", "Manifest", "PageEntry", "Ref", "RefKind", "Repository", "Snapshot"]
