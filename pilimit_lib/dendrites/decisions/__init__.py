"""When to grow, when to stop growing."""
