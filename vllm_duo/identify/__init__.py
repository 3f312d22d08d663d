"""Find a model's retrieval heads and write them as a head pattern.

One file a method (`gates`, `retrieval_score`, `induction`, `on_the_fly`, `exclusive`), one registry
(`registry`), one way through (`run`). Nothing here is imported by the plugin; torch and transformers
are.
"""
