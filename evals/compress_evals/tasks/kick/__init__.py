"""The kick group: real questions; usable by plain lm-eval with `--include_path` on this folder and KICK_DATA_DIR."""
