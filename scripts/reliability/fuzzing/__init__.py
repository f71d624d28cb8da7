"""Parts of ``fuzz.py``: how inputs are made, what reads them, and the worker processes that watch the readers."""
