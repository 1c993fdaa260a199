"""What veRL needs to run on this machine: device, process settings, placement."""
