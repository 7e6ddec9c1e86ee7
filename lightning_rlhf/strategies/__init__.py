"""How a run is spread over processes and kept on disk."""
