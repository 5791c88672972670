"""What the tests share: real etcds, supervisors, clients and terminals, and ways to wait for facts."""
