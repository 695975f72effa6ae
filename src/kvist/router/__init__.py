"""Routing: what workers tell of their blocks, an index of it, and who should serve a request."""
