"""Taps and losses -> Kronecker factors: where graphs and linear algebra meet."""
