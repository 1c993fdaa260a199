"""HTML reports: figures and a page of one run, and a live dashboard of several runs."""
