"""Clients that send messages to peers, blocking and on asyncio."""
