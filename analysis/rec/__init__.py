"""Referring-expression comprehension: boxes, datasets, scoring."""
