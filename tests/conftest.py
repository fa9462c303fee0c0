"""Settings of all tests."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
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


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in as many parts wherever they are taken; and small tensors do not wait for threads."""
    with threads(1):
        yield


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As users have them, at least."""
    with threads(2):
        yield
