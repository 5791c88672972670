"""Datagrams, sockets, senders in C and peerd workers: what the benchmarks of the data path share."""
