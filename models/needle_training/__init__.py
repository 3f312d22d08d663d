"""Trains the needle model: a tiny Llama or Qwen2 that finds a pass key in a long text."""
