"""The parts of ``benchmarks.serve``: stock vLLM and duo under the same load."""
