"""Further passes over the data that bring factors nearer to the exact blocks."""
