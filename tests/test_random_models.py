"""Random models: the gradients from the taps are autograd's, or the model is refused by name.

25 models, the same in every run; `pytest tests/test_random_models.py --random-models=3000` for
more, and `--hypothesis-show-statistics` for what became of them.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

import pytest
from hypothesis import event, given, note, settings
from hypothesis import strategies as st
from random_models import RandomModel, random_models
from torch import nn

import fxkfac
from fxkfac.errors import CaptureError, UnsupportedUse

MOST_REFUSED = 0.1
OUTCOMES: Counter[str] = Counter()


@cache  # hypothesis draws some models twice
def outcome(model: RandomModel, n: int, other: int) -> str:
    """Trace at one batch size, check there and at another one."""
    x, y = model.data(n)
    try:
        program = fxkfac.trace(model.function, x, model.tensors)
        for size in (n, other):
            x, y = model.data(size)
            found = fxkfac.check(program, nn.MSELoss(), (x, y))
            assert set(found) == set(model.params)
            assert max(found.values()) < 1e-9, (size, found)
    except (CaptureError, UnsupportedUse) as error:
        if crashed(error):
            raise AssertionError("an exception was swallowed while capturing") from error
        return f"refused: {type(error).__name__}"
    return "right" if not program.at(x)[0].refusals else "right, not by the first front end"


def crashed(error: Exception) -> bool:
    """Whether the last front end gave no reason of its own but passed an exception on.

    These models are plain code, so this is a mistake of ours that capturing has swallowed.
    """
    last = [line for line in str(error).splitlines() if line.startswith("  make_fx (real): ")]
    return any(re.match(r"  make_fx \(real\): \w*(Error|Exception)\b", line) for line in last)


@settings.get_profile("random models")
@given(random_models(), st.integers(3, 5), st.sampled_from([6, 7, 2, 1]))
def test_gradients_are_right_or_the_model_is_refused(model, n, other):
    note(repr(model))
    result = outcome(model, n, other)
    OUTCOMES[result] += 1
    event(result)


def test_few_are_refused():
    if not OUTCOMES:
        pytest.skip("counts what the test before has drawn")
    refused = sum(count for name, count in OUTCOMES.items() if name.startswith("refused"))
    assert refused <= MOST_REFUSED * OUTCOMES.total(), OUTCOMES
