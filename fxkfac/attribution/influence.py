"""Program, loss, factors, two sets of data -> the influence of every datum on every other one.

    score(i, j) = −g_iᵀ (C + λ I)⁻¹ g_j

with g the gradient of one datum's own loss and C its curvature (Koh and Liang 2017; with Kronecker
factors, Grosse et al. 2023). Gradients stay in the factored form in which the taps give them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from fxkfac.attribution.solve import Solved, Solver, solvers_of
from fxkfac.attribution.taps import Batch, Reader
from fxkfac.curvature.corrections.corrected import Corrected, uncorrected
from fxkfac.curvature.data import Data, batches
from fxkfac.curvature.factors import Factors
from fxkfac.curvature.options import require_program, settings_again
from fxkfac.curvature.plan import require_same_terms
from fxkfac.curvature.point import require_here
from fxkfac.curvature.settings import Settings, differences
from fxkfac.errors import DataError, MergeError
from fxkfac.functional import Params
from fxkfac.graph.program import Program
from fxkfac.isolation import full_precision
from fxkfac.likelihoods.losses import likelihood_of
from fxkfac.linalg.rows import Rows, chunks
from fxkfac.ranges import require_count

if TYPE_CHECKING:
    from jaxtyping import Float

MEMORY = 2**30
RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


@full_precision()
def influence(
    program: Program,
    loss: Any,
    factors: Factors | Corrected,
    train: Data,
    test: Data,
    damping: float,
    params: Params | None = None,
    memory: int = MEMORY,
) -> Float[Tensor, "n_train n_test"]:
    """score(i, j) = −g_iᵀ (C + λ I)⁻¹ g_j for all pairs of a training and a test datum.

    With g the gradient of one datum's own loss and C the curvature (Koh & Liang 2017; with
    Kronecker factors Grosse et al. 2023).

    It is how fast the loss of test datum j changes as the weight of training datum i grows: below
    zero where i helps j. To leave i out changes the loss of j by about −score over what the loss's
    mean divides by: N for one label per datum, N dim Y for MSE and BCE, the number of tokens for
    sequences. A datum is what the batch axis counts: a sequence with all of its tokens.

    Args:
        program: What `fxkfac.trace` returned.
        loss: As of `fxkfac.kfac`. A datum's own loss is that with `reduction="sum"` for this datum
            alone, whatever the reduction.
        factors: C, as `fxkfac.kfac` returned it for the same program; or, with eigenvalues that are
            right, `fxkfac.ekfac`. What has no block there has no part in the scores.
        train, test: One (inputs, targets) pair, or an iterable of them, in an order that stays.
        damping: λ, added to every eigenvalue of C. A weight decay of ½ λ ‖θ‖² is one, too.
        params: Tensors in the place of the model's own parameters.
        memory: Bytes that what is made of the test data may take at once. Training data are gone
            through once for each part of the test data that fits, and are then to be iterated anew.

    Returns:
        The scores, of shape (n_train, n_test), in the order of the data.

    Raises:
        OptionError: The damping is negative, or zero where a block is singular; `factors` are none.
        MergeError: The factors are of other parameters, or of other blocks, or were computed when
            these had other values.
        DataError: No data, inputs and targets that do not fit, or a shuffled DataLoader.
        NonFiniteError: NaN or Inf in a gradient.
        BatchAxisError: Data are coupled, or it is not known which datum a row belongs to.
        UnsupportedUse: A block is of a parameter that has no normal form.
    """
    scores = _scores(
        program, loss, factors, {"train": train, "test": test}, damping, params, memory
    )
    return -torch.cat([scores.of(train, group) for group in scores.groups(test)], 1)


@full_precision()
def token_influence(
    program: Program,
    loss: Any,
    factors: Factors | Corrected,
    train: Data,
    test: Data,
    damping: float,
    params: Params | None = None,
    memory: int = MEMORY,
) -> Float[Tensor, "n_train tokens n_test"]:
    """The same for every token of the training data by itself: score(i, t, j), whose sum is that.

    A datum's own loss is a sum over its sites: those of a language model are its tokens, each with
    the loss of one label, −log p(y_t | y_<t). The score says how fast the loss of test datum j
    changes as the weight of this one term grows. A label that is ignored has zeros.

    It takes one backward pass over the training data for each of the sites, from one forward pass.

    Args:
        program, loss, factors, train, test, damping, params, memory: As of `influence`.

    Returns:
        The scores, of shape (n_train, sites, n_test), in the order of the data and of the sites
        along the prediction's axes.

    Raises:
        DataError: As `influence` does; or training data differ in the number of sites.
        OptionError, MergeError, NonFiniteError, BatchAxisError, UnsupportedUse: As `influence`.
    """
    scores = _scores(
        program, loss, factors, {"train": train, "test": test}, damping, params, memory
    )
    return -torch.cat([scores.of_sites(train, group) for group in scores.groups(test)], 2)


def _scores(
    program: Program,
    loss: Any,
    factors: Factors | Corrected,
    data: Mapping[str, Data],
    damping: float,
    params: Params | None,
    memory: int,
) -> _Scores:
    require_program(program)
    base = uncorrected(factors)
    state = program.state(params)
    reader = Reader(program, likelihood_of(loss), base.settings, state)
    _require_same(program, loss, base.settings)
    require_here(base.point, state)
    for name, given in data.items():
        _require_order(name, given)
    require_count("memory", memory, "whole number of bytes", least=0)
    return _Scores(reader, base, solvers_of(factors, damping), memory)


@dataclass(frozen=True)
class SolvedData:
    """Some test data, solved: for every block, what each of its terms has become."""

    n: int
    blocks: Mapping[str, tuple[Solved, ...]]

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(s.P.nbytes for solved in self.blocks.values() for s in solved)


@dataclass(frozen=True)
class _Scores:
    """One call of `influence`."""

    reader: Reader
    factors: Factors
    solvers: Mapping[str, Solver]
    memory: int

    def groups(self, test: Data) -> Iterator[list[SolvedData]]:
        """Test data, as many at a time as memory has room for."""
        group: list[SolvedData] = []
        for part in self._parts(test):
            if group and sum(p.nbytes for p in [*group, part]) > self.memory:
                yield group
                group = []
            group.append(part)
        yield group

    def of(self, train: Data, group: list[SolvedData]) -> Float[Tensor, "n_train m"]:
        """gᵀ P of all training data and some test data."""
        return torch.cat([self._products(batch, group) for batch in self._read("train", train)])

    def of_sites(self, train: Data, group: list[SolvedData]) -> Float[Tensor, "n_train sites m"]:
        """The same for every site by itself."""
        found: list[Tensor] = []
        for where, inputs, targets in _numbered("train", train):
            batches_of_sites = self.reader.read_sites(inputs, targets, where)
            each = [self._products(self._fitting(b), group) for b in batches_of_sites]
            found.append(torch.stack(each, 1))
            if found[-1].shape[1] != found[0].shape[1]:
                raise DataError(
                    f"{where} has {found[-1].shape[1]} tokens for each datum, and the batches "
                    f"before {found[0].shape[1]}; expected as many in all. Pad them, with targets "
                    "that are ignored."
                )
        return torch.cat(found)

    def _parts(self, test: Data) -> Iterator[SolvedData]:
        numel = sum(solver.numel for solver in self.solvers.values())
        largest = self.memory // self.factors.like.element_size()
        for batch in self._read("test", test):
            rows = {name: self._rows(batch, name) for name in self.solvers}
            for start, size in chunks(batch.n, largest // max(numel, 1)):
                solved = {
                    name: tuple(self.solvers[name].solve([r.some(start, size) for r in of_block]))
                    for name, of_block in rows.items()
                    if of_block
                }
                yield SolvedData(size, solved)

    def _read(self, name: str, data: Data) -> Iterator[Batch]:
        for where, inputs, targets in _numbered(name, data):
            yield self._fitting(self.reader.read(inputs, targets, where))

    def _fitting(self, batch: Batch) -> Batch:
        require_same_terms(batch.schedule.blocks, self.factors.plans.values())
        return batch

    def _rows(self, batch: Batch, name: str) -> list[Rows]:
        """Of every term of a block; none for a parameter that nothing uses."""
        if name in batch.blocks:
            return [batch.term(term) for term in batch.blocks[name]]
        formed = batch.exact(name)
        return [] if formed is None else [formed]

    def _products(self, batch: Batch, group: list[SolvedData]) -> Float[Tensor, "n m"]:
        like = self.factors.like
        total = [like.new_zeros(batch.n, part.n) for part in group]
        for name in self.solvers:
            rows = self._rows(batch, name)
            for j, part in enumerate(group):
                # Either side has none where nothing uses the parameter.
                for solved, own in zip(part.blocks.get(name, ()), rows, strict=False):
                    total[j] = total[j] + solved.products(own)
        return torch.cat(total, 1)


def _numbered(name: str, data: Data) -> Iterator[tuple[str, Any, Any]]:
    for number, (inputs, targets) in enumerate(batches(data)):
        yield f"batch {number} of {name}", inputs, targets


def _require_same(program: Program, loss: Any, had: Settings) -> None:
    """Raise `MergeError` unless the factors are of this program."""
    differ = differences(had, settings_again(program, loss, had, had.masked))
    for what in ("parameters", "structures"):
        if what in differ:
            here, there = differ[what]
            raise MergeError(
                f"the factors and the program differ in the {what} {list({**here, **there})}; "
                "expected factors of this program. Compute them anew."
            )


def _require_order(name: str, data: Iterable[Any]) -> None:
    samplers = [getattr(data, "sampler", None), getattr(data, "batch_sampler", None)]
    samplers.append(getattr(samplers[1], "sampler", None))
    if any(isinstance(s, RANDOM) or getattr(s, "shuffle", None) is True for s in samplers):
        raise DataError(
            f"{name} is a DataLoader that shuffles, so that nobody knows which datum a score is "
            "of; expected data in an order that stays. Pass shuffle=False."
        )
