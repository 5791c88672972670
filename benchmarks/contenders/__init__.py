"""supervisors.py: the supervisor beside supervisord and circus."""
