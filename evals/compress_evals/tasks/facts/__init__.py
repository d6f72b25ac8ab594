"""The facts group; usable by plain lm-eval with `--include_path` on this folder."""
