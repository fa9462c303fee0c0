"""One family of errors. Each message names what was found, what was expected and what to do."""


class FxkfacError(Exception):
    """Base class of every error that fxkfac raises on purpose."""


class CaptureError(FxkfacError):
    """No front end could turn the model into a graph that equals the model."""


class UnsupportedUse(FxkfacError):
    """A parameter enters an op through which its curvature cannot be tapped."""


class UnknownParameter(FxkfacError, KeyError):
    """A name or pattern matches no parameter of the model."""

    __str__ = Exception.__str__  # KeyError would print the message in quotes


class ParameterError(FxkfacError, ValueError):
    """Parameters differ in device, dtype or shape from what is expected."""


class DataError(FxkfacError, ValueError):
    """Inputs or targets are empty, of different length, out of range, or not finite."""


class NoDataError(DataError):
    """There is no batch, or no target that counts.

    Attributes:
        part: What was computed of these data all the same, as one part of larger data; it has no
            blocks where there was no batch.
    """

    part: object = None


class NonFiniteError(FxkfacError, ValueError):
    """A prediction, a gradient or a factor holds NaN or Inf."""


class LossError(FxkfacError, ValueError):
    """The loss has no likelihood here, or no square root of its Hessian where one is needed."""


class OptionError(FxkfacError, ValueError):
    """An argument is outside its range."""


class BatchAxisError(FxkfacError):
    """It is not known along which axis of a tap the data are laid out."""


class TapMismatch(FxkfacError):
    """The gradient put together from the taps differs from autograd's."""


class BlockError(FxkfacError, AttributeError):
    """A block has not what is asked of it, as a diagonal has no factors and a sum several."""


class MergeError(FxkfacError, ValueError):
    """Two partial results do not belong to the same computation."""


class FileError(FxkfacError):
    """A file cannot be written, or is not whole, or does not hold what is expected."""


class RankError(FxkfacError):
    """Another process of a distributed computation has failed, or there are no other processes."""


class TargetError(FxkfacError, ValueError):
    """What a command line names is not there, or does not return a model and what goes with it."""
