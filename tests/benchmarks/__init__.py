"""Time and memory of fxkfac beside its peers; run it with `make bench`."""
