"""The facts group; plain lm-eval can use it with `--include_path` on this folder."""
