"""What a server would hold, worked out from a model's config.json: no weights, no vLLM, no torch."""
