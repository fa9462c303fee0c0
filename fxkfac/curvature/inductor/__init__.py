"""Passes over the data as compiled code."""
