"""supervisors.py: the supervisor compared with supervisord and circus."""
