"""lm-eval tasks, with one folder per group."""
