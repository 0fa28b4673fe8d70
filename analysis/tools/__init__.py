"""Tools for a person: ask a model about a picture, explore settings, compare methods, report all results."""
