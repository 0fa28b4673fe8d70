"""The second paper: one model that extracts and abstracts, and what keeps its two attentions consistent.

Hsu et al., "A Unified Model for Extractive and Abstractive Summarization using Inconsistency Loss", arXiv:1805.06266.
"""
