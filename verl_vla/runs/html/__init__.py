"""What a run did, as figures and as a page; the dashboard shows the same, live."""
