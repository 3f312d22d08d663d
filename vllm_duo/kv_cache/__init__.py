"""KV memory of the two head classes: arithmetic, block claims, vLLM specs and managers."""
