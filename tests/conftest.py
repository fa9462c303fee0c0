"""Settings of all tests."""

from hypothesis import settings

# A time is never a test: machines are shared.
settings.register_profile("fxkfac", deadline=None)
settings.load_profile("fxkfac")
