"""Trains the needle model: a tiny Llama that finds a pass key in a long text."""
