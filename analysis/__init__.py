"""What breaks when a model selects its context, and what keeps it whole."""

from pathlib import Path

# A clone holds notebooks, rows and figures beside the package, and every path derives from its folder, whatever the
# working directory. An installed wheel has none of them: it reads and writes where it is called.
_BESIDE = Path(__file__).parents[1]
IN_CLONE = (_BESIDE / "notebooks" / "10_rec_eval.ipynb").is_file()
ROOT = _BESIDE if IN_CLONE else Path.cwd()
