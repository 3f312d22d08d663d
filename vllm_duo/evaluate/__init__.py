"""Quality checks: prompts whose answer is known, and later the scoring of a server on them."""
