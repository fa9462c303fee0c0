"""The default device is the caller's: nothing of fxkfac's own is made on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from devices import (
    CAPABILITIES,
    assert_equal,
    digits_like,
    network,
    of_factors,
    on_the_cpu,
    traced,
)
from quick import one_in, quick
from zoo import ZOO

import fxkfac


@pytest.fixture
def meta() -> Iterator[None]:
    """A default device on which nothing has a value: whatever is made there shows."""
    with torch.device("meta"):
        yield


@pytest.mark.parametrize("name", quick(CAPABILITIES, one_in(2)))
def test_the_default_device_is_left_alone(name: str, meta: None) -> None:
    with torch.device("cpu"):
        model, data, expected = network(), digits_like(), on_the_cpu(name)
    assert_equal(CAPABILITIES[name](model, data), expected, "cpu")


MADE_IN_VIEWS = ("einsum_heads", "bmm_experts", "called_twice", "different_ranks", "biases_only")


@pytest.mark.parametrize("name", MADE_IN_VIEWS)
def test_programs_are_the_same_under_any_default_device(name: str) -> None:
    entry = ZOO[name]
    model, params = entry.build()
    data = entry.data(4)
    with torch.device("meta"):
        program = traced(entry, model, params, data)
        found = of_factors(fxkfac.kfac(program, entry.loss, data, fisher="type-2"))
        assert max(fxkfac.check(program, entry.loss, data).values()) < entry.tolerance
    expected = fxkfac.kfac(program, entry.loss, data, fisher="type-2")
    assert_equal(found, of_factors(expected), "cpu")
