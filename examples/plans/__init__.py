"""What runs on large models take, planned from their configs."""
