"""`python -m kvist`."""

from __future__ import annotations

from kvist.cli.main import main

main()
