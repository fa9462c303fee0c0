"""Losses as negative log-likelihoods, and the vectors that every Fisher flavour sends back."""
