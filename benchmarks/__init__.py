"""Speed, memory and learning beside other implementations, on the same work."""
