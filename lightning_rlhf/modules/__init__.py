"""One algorithm a file, and the bases that they stand on."""
