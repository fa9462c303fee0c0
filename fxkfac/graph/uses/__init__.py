"""A graph -> every use of every parameter, in normal form."""
