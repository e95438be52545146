"""The LevelDB binding of this Python: plyvel, or from 3.13 on its successor with the same interface."""

from __future__ import annotations

try:
    import plyvel
except ImportError:
    import plyvel_next as plyvel

__all__ = ["plyvel"]
