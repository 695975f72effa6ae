"""Blocks: decisions on which block lives where. Pure: knows no bytes, no store, no engine and no clock."""
