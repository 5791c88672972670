"""The frame of every benchmark: options, trials, tables, claims, child processes."""
