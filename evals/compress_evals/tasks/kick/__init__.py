"""The kick group, with public data sets; plain lm-eval can use it with `--include_path` here and KICK_DATA_DIR."""
