"""``python -m gsocketpool``. Nothing of the pool needs it; it needs the extra ``cli``."""
