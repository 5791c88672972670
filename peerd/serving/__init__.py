"""The App that a user writes, and what runs it: a worker process, or a peer inside another program."""
