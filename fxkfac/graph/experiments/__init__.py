"""Runs of a graph that tell what its nodes do not: is it the model, and where are the data."""
