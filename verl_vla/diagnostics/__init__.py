"""Is what runs here what was published? ``doctor --libero`` and the file that others run."""
