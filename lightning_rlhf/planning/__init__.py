"""Where the memory of a run goes, from its configuration alone."""
