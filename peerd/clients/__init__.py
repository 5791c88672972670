"""Clients that send messages to peers: one for threads, one for asyncio, and the parts that they share."""
