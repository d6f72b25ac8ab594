"""Low-rank factorization: one file for each paper."""
