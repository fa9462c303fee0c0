"""A model, or whatever torch can record of it -> one kind of graph, and what no graph can hold."""
