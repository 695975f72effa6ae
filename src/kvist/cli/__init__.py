"""Command line: one file a command group, one sink for output, one place where errors become words and exit codes."""
