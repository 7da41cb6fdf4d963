"""What somebody outside of the suite would write to add to it: each in its own folder, for `tests/test_adding.py`."""
