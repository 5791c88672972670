"""throughput.py: rates, CPU time and round trips of peerd beside other receivers."""
