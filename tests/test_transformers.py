"""Hugging Face transformers, with dicts of keywords in and `ModelOutput` out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch

pytest.importorskip("transformers", reason="the models are those of transformers")

from quick import quick
from test_zoo import State, assert_close, assert_same
from transformer_models import CASES, Case

import fxkfac
from fxkfac import errors

TRACED = 4  # batch size at which everything is traced
LANGUAGE = ("gpt2", "llama")
QUICK = {"gpt2", "vit", "clip_text"}


@dataclass(frozen=True)
class Traced:
    """A case, its program, and the user's state before and after tracing."""

    case: Case
    program: fxkfac.Program
    before: State
    after: State


@cache
def traced(name: str) -> Traced:
    case = CASES[name]()
    before = State.of(case.model, None)
    program = fxkfac.trace(case.model, case.inputs(TRACED), structure=case.structure)
    return Traced(case, program, before, State.of(case.model, None))


@pytest.mark.parametrize("name", quick(CASES, QUICK.__contains__))
def test_coverage(name):
    at = traced(name)
    found = {row.parameter: row.structure for row in at.program.coverage()}
    assert set(found) >= {n for n, p in at.case.model.named_parameters() if p.requires_grad}
    assert found == {n: at.case.structure_of(n) for n in found}
    assert at.program.tapped.coupled == at.case.coupled


@pytest.mark.parametrize("name", quick(CASES, QUICK.__contains__))
def test_gradients_from_the_taps_are_autograds(name):
    at = traced(name)
    for n in (TRACED, 2, 7):
        found = fxkfac.check(at.program, at.case.loss, at.case.data(n))
        assert set(found) == set(at.program.parameters)
        assert max(found.values()) < at.case.tolerance, (n, found)


@pytest.mark.parametrize("name", quick(CASES, QUICK.__contains__))
def test_one_graph_is_good_for_all_batch_sizes(name):
    at = traced(name)
    graph = at.program.at(at.case.inputs(TRACED))[0]
    assert graph.dynamic
    assert all(at.program.at(at.case.inputs(n))[0] is graph for n in (2, 7))


@pytest.mark.parametrize("name", quick([n for n in CASES if n != "clip"], QUICK.__contains__))
def test_parts_of_the_data(name):
    at = traced(name)
    whole = fxkfac.kfac(at.program, at.case.loss, at.case.data(5), fisher="empirical")
    parts = [at.case.data(2), at.case.data(5, start=2)]
    merged = fxkfac.kfac(at.program, at.case.loss, parts, fisher="empirical")
    assert list(merged) == list(whole)
    for block, part in zip(whole.values(), merged.values(), strict=True):
        error = (part.dense() - block.dense()).norm()
        assert error <= at.case.tolerance * block.dense().norm()


@pytest.mark.parametrize("name", quick(CASES, QUICK.__contains__))
def test_nothing_of_the_users_changes(name):
    at = traced(name)
    at.before.require_same(at.after)
    assert not any(p.grad is not None for p in at.case.model.parameters())


@pytest.mark.slow
def test_a_matrix_of_comparisons_is_coupled():
    """No part of CLIP's prediction is one datum's own: exact blocks are refused, factors go."""
    at = traced("clip")
    data = at.case.data(5)
    with pytest.raises(errors.BatchAxisError):
        fxkfac.kfac(at.program, at.case.loss, data, fisher="empirical")
    without = fxkfac.trace(at.case.model, data[0], structure={"*logit_scale": "identity"})
    factors = fxkfac.kfac(without, at.case.loss, data, fisher="empirical")
    assert torch.isfinite(factors["model.visual_projection.weight"].dense()).all()


@pytest.mark.parametrize("name", LANGUAGE)
def test_shifted_labels_give_the_models_own_loss(name):
    """What stands in the wrapper and the labels is the loss that transformers computes."""
    case = traced(name).case
    inputs, targets = case.data(3)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    assert (targets == -100).any()
    expected = case.model.model(**inputs, labels=labels).loss  # computed in float32
    torch.testing.assert_close(case.loss(case.model(**inputs), targets).float(), expected)


@pytest.mark.parametrize("name", LANGUAGE)
def test_exact_blocks_of_a_language_model(name):
    """With -100 among the labels, the diagonal of the last norm is the GGN's."""
    at = traced(name)
    data = at.case.data(3)
    norm = "model.transformer.ln_f.weight" if name == "gpt2" else "model.model.norm.weight"
    program = fxkfac.trace(at.case.model, data[0], [norm])
    found = fxkfac.kfac(program, at.case.loss, data).dense(norm)
    expected = fxkfac.exact.ggn(at.case.model, at.case.loss, data, norm)
    assert_close(found.diagonal(), expected.diagonal())


@pytest.mark.slow
@pytest.mark.parametrize("name", LANGUAGE)
def test_padding_is_as_if_it_were_not_there(name):
    """With the mask, padded data have the factors of the same data without padding."""
    at = traced(name)
    inputs, targets = at.case.data(4)

    def alone(k: int):
        length = int(inputs["attention_mask"][k].sum())
        own = {key: t[k : k + 1, :length] for key, t in inputs.items()}
        return own, targets[k : k + 1, : length - 1]

    def factors(data, **options):
        return fxkfac.kfac(at.program, at.case.loss, data, fisher="empirical", **options)

    expected = factors([alone(k) for k in range(4)])
    assert_same(factors((inputs, targets), mask="attention_mask"), expected)
