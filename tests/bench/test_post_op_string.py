import pytest

from vnnigen.bench.post_op_string import parse_post_ops
from vnnigen.errors import VnnigenError
from vnnigen.kernels.post_ops import Clip, LeakyReLU, Linear, ReLU


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
    ],
)
def test_parses(text, expected):
    assert parse_post_ops(text) == expected


@pytest.mark.parametrize(("text", "scale"), [("sum", 1.0), ("sum:0.5", 0.5)])
def test_sum_is_of_the_output_buffer(text, scale):
    (post_op,) = parse_post_ops(text)
    assert (post_op.scale, post_op.tensor) == (scale, None)


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("gelu", "'gelu' is not known"),
        ("relu,", "'' is not known"),
        ("clip:0", "write clip:LOW:HIGH"),
        ("relu:1", "has 1 arguments"),
        ("leaky:x", "no number"),
        ("sum:1:2", "write sum"),
        ("clip:6:0", "(?i)clip"),
        ("linear:nan:0", "(?i)alpha|linear"),
    ],
)
def test_errors(text, needle):
    with pytest.raises(VnnigenError, match=needle):
        parse_post_ops(text)
