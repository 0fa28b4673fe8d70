"""The tests. What several of them share is in `tests.support`; a test imports no other test."""
