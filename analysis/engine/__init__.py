"""Evaluation: images x cells -> rows, decoding with explicit IDs, shared prefixes, cost."""
