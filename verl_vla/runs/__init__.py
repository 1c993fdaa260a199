"""Files of a run: writing, reading, reports."""
