"""throughput.py: rates, CPU time and round trips of peerd and other receivers."""
