"""Convolutions on patches, and transposed ones from patches."""

from __future__ import annotations

from torch import nn
from zoo import Made, rand

from reference.case import CE, MSE, MSE_SUM, N, case, of_the_zoo
from reference.images import conv, pad, transposed_conv


@case(
    lambda: nn.Sequential(
        nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(27, 3),
    ),
    lambda: rand(N, 2, 6, 4),
    CE,
)  # fmt: skip
def conv_stride_padding(p, x, tape):
    h = conv(tape, "0", pad(x, (1, 1), (0, 0)), stride=(2, 1)).relu()
    return tape.linear("3", h.flatten(1))


@case(
    lambda: nn.Sequential(
        nn.Conv2d(4, 6, (2, 3), dilation=(2, 1), groups=2, padding="same"), nn.Tanh(),
        nn.Conv2d(6, 6, 2, groups=6, bias=False),
    ),
    lambda: rand(N, 4, 3, 4),
    MSE_SUM,
)  # fmt: skip
def conv_groups_dilation(p, x, tape):
    h = conv(tape, "0", pad(x, (1, 1), (1, 1)), dilation=(2, 1), groups=2).tanh()
    return conv(tape, "2", h, groups=6)


@case(
    lambda: nn.Sequential(nn.Conv1d(2, 3, 4, padding="same", dilation=1), nn.Sigmoid()),
    lambda: rand(N, 2, 6),
    MSE,
)
def conv_same_even(p, x, tape):
    return conv(tape, "0", pad(x, (1, 2))).sigmoid()


@case(
    lambda: nn.Sequential(
        nn.Conv3d(1, 2, 2, stride=(1, 2, 1), dilation=(1, 1, 2)), nn.Tanh(), nn.Flatten(2)
    ),
    lambda: rand(N, 1, 3, 4, 3),
    CE,
)
def conv_3d_classes(p, x, tape):
    return conv(tape, "0", x, stride=(1, 2, 1), dilation=(1, 1, 2)).tanh().flatten(2)


@of_the_zoo
def conv_1d(p, x, tape):
    """The second one is causal: its padding is before the sequence."""
    h = conv(tape, "a", pad(x, (1, 1)), stride=2).tanh()
    return conv(tape, "b", pad(h, (4, 0)), dilation=2).mean(-1)


@of_the_zoo
def conv_3d(p, x, tape):
    h = conv(tape, "0", pad(x, (0, 0), (1, 1), (1, 1)), stride=(1, 2, 1))
    return h.tanh().mean((2, 3, 4))


@of_the_zoo
def conv_same(p, x, tape):
    return conv(tape, "0", pad(x, (1, 2), (2, 2)), dilation=(1, 2)).tanh()


@of_the_zoo
def conv_circular(p, x, tape):
    h = conv(tape, "0", pad(x, (1, 1), (1, 1), mode="circular")).tanh()
    return conv(tape, "2", pad(h, (1, 1), (1, 1), mode="reflect"))


@of_the_zoo
def conv_depthwise(p, x, tape):
    h = conv(tape, "2", conv(tape, "0", x, groups=3).relu())
    return h.mean((2, 3))


@of_the_zoo
def conv_groups(p, x, tape):
    """The channels are shuffled in between: (groups, channels) -> (channels, groups)."""
    h = conv(tape, "0", pad(x, (1, 1), (1, 1)), groups=2).tanh()
    h = h.unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2)
    return conv(tape, "3", h, groups=3).mean((2, 3))


@of_the_zoo
def conv_called_twice(p, x, tape):
    """The places of both scales are shared axes of one layer."""
    small = x.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5))
    large = conv(tape, "conv", pad(x, (1, 1), (1, 1))).tanh()
    small = conv(tape, "conv", pad(small, (1, 1), (1, 1))).sin()
    return large + small.repeat_interleave(2, 2).repeat_interleave(2, 3)


@of_the_zoo
def patch_embedding(p, x, tape):
    tokens = conv(tape, "patch", x, stride=2).flatten(2).mT + tape.own("places")[:, 0]
    return tape.linear("head", (tokens + tape.linear("mix", tokens).tanh()).mean(1))


@of_the_zoo
def transposed_conv_1d(p, x, tape):
    y = transposed_conv(tape, "0.weight", x, stride=2, padding=1, output_padding=1)
    return (y + tape.own("0.bias")[:, :, None]).tanh()


@of_the_zoo
def transposed_conv_2d(p, x, tape):
    y = transposed_conv(tape, "2.weight", conv(tape, "0", x).tanh(), stride=2)
    return (y + tape.own("2.bias")[:, :, None, None]).sigmoid()


@of_the_zoo
def transposed_conv_3d(p, x, tape):
    y = transposed_conv(tape, "0.weight", x)
    return (y + tape.own("0.bias")[:, :, None, None, None]).tanh()


@of_the_zoo
def transposed_conv_groups_dilation(p, x, tape):
    return transposed_conv(tape, "0.weight", x, dilation=2, groups=2).tanh()


@case(
    lambda: Made(
        lambda m, x: m.up(x).tanh(),
        up=nn.ConvTranspose2d(
            4, 2, (2, 3), stride=(2, 3), padding=1, output_padding=(1, 1), dilation=(2, 1), groups=2
        ),
    ),
    lambda: rand(N, 4, 2, 2),
    MSE_SUM,
)
def transposed_conv_of_everything(p, x, tape):
    y = transposed_conv(
        tape, "up.weight", x,
        stride=(2, 3), padding=1, output_padding=1, dilation=(2, 1), groups=2,
    )  # fmt: skip
    return (y + tape.own("up.bias")[:, :, None, None]).tanh()
