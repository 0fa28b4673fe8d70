"""What breaks when a model selects its context, and what keeps it whole."""

from pathlib import Path

ROOT = Path(__file__).parents[1]  # the project's folder: every path derives from it, whatever the working directory
