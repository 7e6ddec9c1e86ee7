"""Pure functions of tensors: no state, no networks, no processes."""
