"""Coding what fine-tuning changed; every pass works on plain weights too: one file = one paper."""
