"""The Triton kernels; the only folder that imports triton, and imported only when a kernel runs."""
