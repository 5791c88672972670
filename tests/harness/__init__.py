"""Shared parts of the tests: real etcds, supervisors, clients and terminals, and ways to wait for facts."""
