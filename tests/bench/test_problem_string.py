"""benchdnn's problem strings: defaults, shorthands and errors as its documentation and parser state them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vnnigen.bench.problem_string import (
    Axis,
    ConvShape,
    GemmShape,
    ProblemStringError,
    parse_conv,
    parse_gemm,
)

UNIT = Axis(1, 1, 1, 1, 1, 0, 0)

CONVS = [
    # the issue's own example
    (
        "mb1ic64ih56iw56oc64kh3kw3sh1sw1ph1pw1g1",
        ConvShape(1, 1, 64, 64, Axis(56, 56, 3, 1, 1, 1, 1), Axis(56, 56, 3, 1, 1, 1, 1)),
    ),
    # mb 2, g 1; widths from heights; padding (1, 1) from oh
    ("ic16oc16_ih5oh5kh3", ConvShape(2, 1, 16, 16, Axis(5, 5, 3, 1, 1, 1, 1), Axis(5, 5, 3, 1, 1, 1, 1))),
    # oh from ih without padding
    ("ic16ih5oc16kh3", ConvShape(2, 1, 16, 16, Axis(5, 3, 3, 1, 1, 0, 0), Axis(5, 3, 3, 1, 1, 0, 0))),
    # ResNet's first layer: the last row of padding is never read, so the bottom gets 2
    (
        'mb1ic3ih224oc64oh112kh7sh2ph3n"conv1"',
        ConvShape(1, 1, 3, 64, Axis(224, 112, 7, 2, 1, 3, 2), Axis(224, 112, 7, 2, 1, 3, 2), "conv1"),
    ),
    # 1-D: only widths
    ("ic17oc17_iw8ow4kw3pw1sw2", ConvShape(2, 1, 17, 17, UNIT, Axis(8, 4, 3, 2, 1, 1, 0))),
    # dilation is 0-based: dh1 is a step of 2
    (
        "mb1ic8ih10oc8kh3dh1ph2",
        ConvShape(1, 1, 8, 8, Axis(10, 10, 3, 1, 2, 2, 2), Axis(10, 10, 3, 1, 2, 2, 2)),
    ),
    # a repeated entry overrides; shapes_regression_padding does it
    (
        "mb1ic16oc16_ih10kh5_kh5ph7sh1",
        ConvShape(1, 1, 16, 16, Axis(10, 20, 5, 1, 1, 7, 7), Axis(10, 20, 5, 1, 1, 7, 7)),
    ),
    # given oh and ph: the other side takes the rest
    (
        "ic16oc16_ih5oh8kh3ph3_g4",
        ConvShape(2, 4, 16, 16, Axis(5, 8, 3, 1, 1, 3, 2), Axis(5, 8, 3, 1, 1, 3, 2)),
    ),
    # sw1 and pw0 are defaults: they do not make the width "given"
    (
        "ic4ih8oc4kh3ph1sw1pw0",
        ConvShape(2, 1, 4, 4, Axis(8, 8, 3, 1, 1, 1, 1), Axis(8, 8, 3, 1, 1, 1, 1)),
    ),
    # depth entries equal to their defaults do not make it 3-D
    ("ic4ih8oc4kh1sd1pd0dd0", ConvShape(2, 1, 4, 4, Axis(8, 8, 1, 1, 1, 0, 0), Axis(8, 8, 1, 1, 1, 0, 0))),
    # odd total padding: less at the top
    (
        "mb1ic4ih8oh8oc4kh2kw1iw6",
        ConvShape(1, 1, 4, 4, Axis(8, 8, 2, 1, 1, 0, 1), Axis(6, 6, 1, 1, 1, 0, 0)),
    ),
    # 1x1 stride 2: the last row is left over (negative padding in benchdnn, none here)
    (
        "ic17oc17_ih8oh4kh1ph0sh2",
        ConvShape(2, 1, 17, 17, Axis(8, 4, 1, 2, 1, 0, 0), Axis(8, 4, 1, 2, 1, 0, 0)),
    ),
    # benchdnn's division truncates: a window one row too large still gives one output, padded at the end
    ("ic1ih2oc1kh3sh2", ConvShape(2, 1, 1, 1, Axis(2, 1, 3, 2, 1, 0, 1), Axis(2, 1, 3, 2, 1, 0, 1))),
    (
        "ic4ih8oc4kh1nplain",
        ConvShape(2, 1, 4, 4, Axis(8, 8, 1, 1, 1, 0, 0), Axis(8, 8, 1, 1, 1, 0, 0), "plain"),
    ),
]


@pytest.mark.parametrize(("text", "expected"), CONVS, ids=[c[0] for c in CONVS])
def test_conv(text, expected):
    assert parse_conv(text) == expected


@pytest.mark.parametrize(
    ("text", "position", "needle"),
    [
        ("ic64xx3", 5, "'xx3'"),
        ("", 1, "'ic' is missing"),
        ("ic64ih56kh3", 12, "'oc' is missing"),
        ("ic64oc64", 9, "no image"),
        ("icoc64ih5kh3", 3, "'ic' needs a number"),
        ("ic64oc64ih-5kh3", 11, "negative"),
        ("ic64oc64ih5kh99999999999", 14, "at most"),
        ("_ic64oc64ih5kh3", 1, "'_ic64"),
        ("ic64__oc64ih5kh3", 6, "'_oc64"),
        ("ic64oc64ih5kh3sh0", 15, "at least 1"),
        ("g0ic64oc64ih5kh3", 1, "at least 1"),
        ("mb0ic64oc64ih5kh3", 1, "at least 1"),
        ("ic0oc64ih5kh3", 1, "at least 1"),
        ("ic64oc64g3ih5kh3", 9, "multiples of g=3"),
        ("ic64oc64ih5id5kd3kh3", 12, "3-D"),
        ("g1ic3oc16_id5od5kd3pd1", 11, "3-D"),
        ("ic64oc64ih5", 12, "'kh' is missing"),
        ("ic64oc64kh3", 12, "'ih' is missing"),
        ("ic64oc64ih5kh3sw2", 18, "'iw' is missing"),
        ("ic64oc64ih5kh9", 12, "larger"),
        ("ic64oc64ih56oh20kh3sh2ph1", 13, "expected 28"),
        ("IC64oc64ih5kh3", 1, "'IC64"),
        ("ic 64", 3, "needs a number"),
    ],
)
def test_conv_errors(text, position, needle):
    with pytest.raises(ProblemStringError) as caught:
        parse_conv(text)
    assert f"character {position}:" in str(caught.value)
    assert needle in str(caught.value)
    assert "\n" not in str(caught.value)


sizes = st.integers(1, 40)
small = st.integers(1, 4)


@given(
    mb=small,
    g=small,
    icg=small,
    ocg=small,
    ih=sizes,
    iw=sizes,
    kh=small,
    kw=small,
    s=small,
    d=small,
    p=st.integers(0, 9),
)
def test_conv_round_trip_and_geometry(mb, g, icg, ocg, ih, iw, kh, kw, s, d, p):
    text = f"mb{mb}g{g}ic{g * icg}oc{g * ocg}ih{ih}iw{iw}kh{kh}kw{kw}sh{s}sw{s}dh{d - 1}dw{d - 1}ph{p}pw{p}"
    if min(ih + 2 * p - (kh - 1) * d, iw + 2 * p - (kw - 1) * d) < 1:
        return
    shape = parse_conv(text)
    assert parse_conv(str(shape)) == shape
    for axis, size, kernel in ((shape.h, ih, kh), (shape.w, iw, kw)):
        assert axis.out == (size + 2 * p - (kernel - 1) * d - 1) // s + 1
        padded = axis.pad_before + size + axis.pad_after
        assert (padded - (kernel - 1) * d - 1) // s + 1 == axis.out
    assert shape.ops == 2 * mb * shape.h.out * shape.w.out * g * ocg * icg * kh * kw
    assert shape.ops_without_padding <= shape.ops
    if p == 0:
        assert shape.ops_without_padding == shape.ops


def test_ops_match_the_figure_that_benchdnn_prints():
    # 0.232429 and 0.225739 Gops: benchdnn's log for ResNet-18's first two convolutions, batch 1
    assert parse_conv("mb1ic3ih224oc64oh112kh7sh2ph3").ops_without_padding == pytest.approx(0.232429e9, abs=1e3)
    assert parse_conv("mb1ic64ih56oc64oh56kh3ph1").ops_without_padding == pytest.approx(0.225739e9, abs=1e3)


def test_shapes():
    shape = parse_conv("mb1ic8ih10iw12oc16g4kh3kw5ph1pw2sh2sw1")
    assert shape.x_shape == (1, 10, 12, 8)
    assert shape.w_shape == (16, 2, 3, 5)
    assert shape.y_shape == (1, 5, 12, 16)
    assert shape.padding == ((1, 0), (2, 2))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("128x768:768x3072", GemmShape(128, 3072, 768)),
        ("10x30:30x20:10x20", GemmShape(10, 20, 30)),
        ('10x30:30x20n"fc"', GemmShape(10, 20, 30, "fc")),
        ("10x30:30x20_nfc", GemmShape(10, 20, 30, "fc")),
    ],
)
def test_gemm(text, expected):
    assert parse_gemm(text) == expected
    assert parse_gemm(str(expected)) == expected
    assert expected.ops == 2 * expected.m * expected.n * expected.k


@pytest.mark.parametrize(
    ("text", "position", "needle"),
    [
        ("128x768:512x3072", 9, "512 rows"),
        ("128x768", 8, "MxK:KxN"),
        ("128x:768x3", 4, "MxK:KxN"),
        ("", 1, "MxK:KxN"),
        ("2x10x30:2x30x20", 1, "3 dimensions"),
        ("10:10x20", 1, "1 dimensions"),
        ("10x30:30x20:10x21", 13, "10x20"),
        ("0x30:30x20", 1, "dimension of 0"),
        ("10x99999999999:99999999999x1", 1, "at most"),
    ],
)
def test_gemm_errors(text, position, needle):
    with pytest.raises(ProblemStringError) as caught:
        parse_gemm(text)
    assert f"character {position}:" in str(caught.value)
    assert needle in str(caught.value)
