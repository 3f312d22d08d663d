"""One HTML file from the JSON results of ``plan``, ``eval`` and ``benchmarks.serve``; no network."""
