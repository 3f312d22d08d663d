"""The attention benchmark on an NVIDIA GPU; needs torch, Triton, NumPy and rich, and no vLLM."""
