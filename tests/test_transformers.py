"""Models of Hugging Face's transformers: which parameters are covered, and taps against autograd.

Left out of environments without transformers.
"""

from __future__ import annotations

from fnmatch import fnmatch

import pytest

pytest.importorskip("transformers")

from transformers_zoo import MODELS

import fxkfac

TRACED = 4
UNCOVERED = {  # patterns of the parameters without Kronecker factors or scales
    "clip": ["*.class_embedding", "*.logit_scale"],
    "t5": ["*.relative_attention_bias.weight"],
    "vit": ["*.cls_token"],
    "wav2vec2": ["*.parametrizations.weight.original?"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_gradients_from_the_taps_are_autograds(name):
    entry = MODELS[name]
    program = fxkfac.trace(entry.model(), entry.inputs(TRACED), unsupported="diagonal")
    patterns = UNCOVERED.get(name, [])
    assert [p for p in program.uncovered if not any(fnmatch(p, q) for q in patterns)] == []
    for n in (2, 5):
        found = fxkfac.check(program, entry.loss, entry.data(n))
        assert set(found) == set(program.parameters)
        assert max(found.values()) < 1e-8, (n, found)
