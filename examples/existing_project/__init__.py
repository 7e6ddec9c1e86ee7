"""A Lightning project of somebody's own, before and after it adopts PPO."""
