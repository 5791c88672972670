"""The process that owns the sockets and keeps the workers running."""
