"""Engines: the only place that imports one. `kvist.engines.hf` is the embedded default.

An engine knows pagers (it implements `CachePager`), hashing and layouts. It must not know repositories, HTTP or the
command line. Importing this package imports no engine.
"""
