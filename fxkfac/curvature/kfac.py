"""Program, loss, data -> factors: one pass over the data, whatever the Fisher.

    A = R Σ_rows x xᵀ        B = (1/#rows) Σ_c Σ_rows g gᵀ

with x the input of a use, g the gradient of ⟨▲_c, prediction⟩ at its output, and ▲ the vectors
that the flavour backpropagates. Paper, Definition 23, Equations 4b and 4c; rows beyond the data,
which the paper leaves out, are those of Eschenhagen et al. (2023).
"""

from __future__ import annotations

from typing import Any

from torch import Generator

from fxkfac.curvature.accumulation import Accumulation
from fxkfac.curvature.data import Data, batches
from fxkfac.curvature.factors import Factors
from fxkfac.curvature.padding import Mask
from fxkfac.functional import Params
from fxkfac.graph.program import Program
from fxkfac.isolation import full_precision


@full_precision()
def kfac(
    program: Program,
    loss: Any,
    data: Data,
    params: Params | None = None,
    fisher: str = "type-2",
    mc_samples: int = 1,
    sharing: str = "expand",
    separate_weight_and_bias: bool = False,
    mask: Mask | None = None,
    generator: Generator | None = None,
    progress: bool = False,
    backend: str = "eager",
    memory: int | None = None,
) -> Factors:
    """The Kronecker factors of every parameter of a program (paper, Definition 23).

    Whatever stops the iteration over the data (Ctrl-C, too) carries what was accumulated until then
    as its attribute `factors`. To save on the way and to go on in another process, see
    `fxkfac.Accumulation`.

    Args:
        program: What `fxkfac.trace` returned.
        loss: `nn.MSELoss`, `nn.CrossEntropyLoss`, `nn.BCEWithLogitsLoss`, or a `Likelihood`. Its
            reduction decides R, for the whole of the data.
        data: One (inputs, targets) pair, or an iterable of them, of any batch sizes.
        params: Tensors in the place of the model's own parameters.
        fisher: `"type-2"` (the GGN for convex losses), `"mc"`, `"type-1"`,
            `"curvature-propagation"`, `"empirical"` or `"forward-only"`.
        mc_samples: Number of samples per datum, for the flavours that draw some.
        sharing: `"expand"` or `"reduce"`, over the axes along which a datum re-uses a weight.
        separate_weight_and_bias: Give each bias a block of its own, rather than W̃ = (W b).
        mask: Which positions of each datum are real, as (N, T): the keyword of an input, such as
            `"attention_mask"`, or a function of (inputs, targets), such as
            `lambda x, y: x["segments"] == 0`. Other rows are left out of A, B and the counts
            wherever an op's rows are the positions, or several at each. Exact blocks, such as that
            of a bias by itself, have no rows and hold all that arrives.
            Without a mask, rows are left out that no term of the loss can see: those at positions
            whose target is the loss's `ignore_index`, and at which no gradient arrives.
        generator: Source of random labels and signs: the same state gives the same factors, bit
            for bit where PyTorch's own operations are. Default: the program's own, which goes on
            from call to call.
        progress: Show a progress bar over the batches.
        backend: `"eager"`, or `"inductor"`: forward and backward pass are compiled, once for each
            shape of a batch, which takes seconds and a C++ compiler; on a GPU, for `"mc"` and
            `"empirical"`, as one CUDA graph, which keeps copies of parameters and data. Labels and
            dropout are drawn as without; results differ by rounding. It pays for models of many
            small operations, such as norms, activations and derivatives in their inputs, for many
            batches of one shape, and on a GPU; products of large matrices are as fast without.
        memory: Bytes that the gradients of vectors which are sent back together may take, counted
            at the outputs of linear ops: of flavours with several vectors, such as `"type-2"`, as
            many go through one backward pass as fit, one at least. Default: on a CPU 32 MiB, beyond
            which it does not get faster; elsewhere 1 GiB. With `backend="inductor"` they go one by
            one.

    Returns:
        A mapping from the name of a weight to its block, in the dtype of the parameters, or in
        float32 where these are in half precision.

    Raises:
        OptionError: An option is out of its range, or does not go together with the structure of
            a block; or `backend="inductor"` cannot trace the graph.
        FxkfacError: `backend="inductor"` finds no C++ compiler, or fails to compile.
        LossError: The loss has no likelihood here, or is not convex where that is needed.
        DataError: Inputs and targets that do not fit; `NoDataError` where there are none.
        NonFiniteError: NaN or Inf in a prediction or factor, with the batch and the layer.
    """
    accumulation = Accumulation(
        program,
        loss,
        params=params,
        fisher=fisher,
        mc_samples=mc_samples,
        sharing=sharing,
        separate_weight_and_bias=separate_weight_and_bias,
        mask=mask,
        generator=generator,
        backend=backend,
        memory=memory,
    )
    return accumulation.over.run(batches(data, progress))
