"""One HTML file from the JSON results of ``plan`` and ``eval``; it needs no network."""
