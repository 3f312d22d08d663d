"""The attention backend: vLLM's interface in front of the operators."""
