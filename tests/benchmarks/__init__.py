"""Time and memory of fxkfac beside its peers; run it with `make bench`.

Where the time of one call of fxkfac goes is printed, in tests/, by
`python -m benchmarks.profile PROBLEM FLAVOUR`.
"""
