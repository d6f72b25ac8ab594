"""lm-eval tasks: one folder a group; see `facts`."""
