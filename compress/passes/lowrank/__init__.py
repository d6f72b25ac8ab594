"""Low-rank factorization: one file, one paper."""
