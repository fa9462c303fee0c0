"""Settings of all tests."""

import pytest
from hypothesis import HealthCheck, settings

# A time is never a test: machines are shared.
settings.register_profile("fxkfac", deadline=None)
settings.load_profile("fxkfac")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--random-models", type=int, default=25, help="how many random models to draw")


def pytest_configure(config: pytest.Config) -> None:
    settings.register_profile(
        "random models",
        deadline=None,
        max_examples=config.getoption("--random-models"),
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
