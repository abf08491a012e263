"""Programs for the odd occasion, run as `python -m tools.NAME`."""
