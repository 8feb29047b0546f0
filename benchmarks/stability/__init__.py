"""Do losses clipped by the ratio break, and does DRPO hold, under staleness and mismatch? See docs/stability.md."""
