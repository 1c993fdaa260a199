"""Run veRL on this machine: device, process settings, placement."""
