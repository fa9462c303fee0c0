"""Training-data attribution: what every datum of one set does to the loss of every other one."""

from fxkfac.attribution.influence import influence, token_influence

__all__ = ["influence", "token_influence"]
