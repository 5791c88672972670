"""flood.py and soak.py: one worker under more load than it can take."""
