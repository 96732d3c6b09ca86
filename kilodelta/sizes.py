"""Write numbers of bytes for people, in messages, reports and pictures."""

from __future__ import annotations


def byte_label(nbytes: float) -> str:
    """Return bytes in the unit that a reader expects, in powers of 1,000.

    Example:
        >>> byte_label(950), byte_label(12_000), byte_label(90.9e6)
        ('950 B', '12 KB', '90.9 MB')
    """
    for unit in ("B", "KB", "MB", "GB"):
        if abs(nbytes) < 999.5 or unit == "GB":  # 999.9 would be written 1e+03
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    raise AssertionError("unreachable")
