import pytest

from vnnigen.bench.post_op_string import parse_post_ops
from vnnigen.errors import VnnigenError
from vnnigen.kernels.post_ops import GELU, Clip, HardSwish, LeakyReLU, Linear, ReLU, Sigmoid, SiLU, Tanh


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        ("  ", ()),
        ("relu", (ReLU(),)),
        ("clip:0:6", (Clip(0.0, 6.0),)),
        ("leaky:0.1,relu", (LeakyReLU(0.1), ReLU())),
        ("leaky", (LeakyReLU(),)),
        ("relu, linear:2:1", (ReLU(), Linear(2.0, 1.0))),
        ("hardswish,sigmoid,tanh", (HardSwish(), Sigmoid(), Tanh())),
        ("silu,silu:1.702", (SiLU(), SiLU(1.702))),
        ("gelu,gelu_tanh", (GELU(), GELU("tanh"))),
    ],
)
def test_parses(text, expected):
    assert parse_post_ops(text) == expected


@pytest.mark.parametrize(("text", "scale"), [("sum", 1.0), ("sum:0.5", 0.5)])
def test_sum_is_of_the_output_buffer(text, scale):
    (post_op,) = parse_post_ops(text)
    assert (post_op.scale, post_op.tensor) == (scale, None)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "max", "min"])
def test_binary_is_with_the_output_buffer(op):
    first, second = parse_post_ops(f"{op},{op}:0.5")
    assert (first.op, first.scale, first.tensor) == (op, 1.0, None)
    assert (second.op, second.scale) == (op, 0.5)


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("swoosh", "'swoosh' is not known"),
        ("relu,", "'' is not known"),
        ("clip:0", "write clip:LOW:HIGH"),
        ("relu:1", "has 1 arguments"),
        ("leaky:x", "no number"),
        ("sum:1:2", "write sum"),
        ("clip:6:0", "(?i)clip"),
        ("silu:-1", "above 0"),
        ("linear:nan:0", "(?i)alpha|linear"),
    ],
)
def test_errors(text, needle):
    with pytest.raises(VnnigenError, match=needle):
        parse_post_ops(text)
