"""The App that a user writes, and what runs it: the worker process, and a peer inside another program."""
