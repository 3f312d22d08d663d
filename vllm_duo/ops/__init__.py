"""Operators: kernels and their references. They know tensors, and no serving framework.

``batch.py`` describes one step's requests and their tables, ``tiles.py`` cuts queries into tiles for
the references; each operator is a folder with its public function and a ``reference.py``.
"""
