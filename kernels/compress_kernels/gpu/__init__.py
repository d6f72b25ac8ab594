"""The Triton kernels; this package alone imports triton, and is imported only when a kernel runs."""
