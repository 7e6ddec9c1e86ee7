"""Worked tasks, one folder each: what differs from the defaults, the command and the curve to expect."""
