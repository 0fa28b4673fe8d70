"""How many tokens a keep ratio keeps; shared by the methods that take one."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal


def check_keep(keep: float | None) -> None:
    """Raises ValueError unless 0 < keep <= 1."""
    if keep is None or not 0 < keep <= 1:
        raise ValueError(f"keep ratio must be in (0, 1], got {keep}; give a share such as 0.25")


def budget(keep: float | None, n: int) -> int:
    """Number of tokens kept out of n: max(1, keep * n rounded half up), with `keep` read as the decimal it prints as.

    Raises ValueError unless 0 < keep <= 1.
    """
    check_keep(keep)
    return max(1, int((Decimal(str(keep)) * n).to_integral_value(ROUND_HALF_UP)))
