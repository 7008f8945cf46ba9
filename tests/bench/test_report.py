"""Figures from known times: operations, ratios, shares of the peak."""

from types import SimpleNamespace

import pytest

from vnnigen.bench import report
from vnnigen.bench.problem_string import GemmShape, parse_conv
from vnnigen.bench.timing import Comparison, Samples
from vnnigen.bench.workload import Request, Workload, f32_request
from vnnigen.errors import VnnigenError


@pytest.fixture
def fakes(monkeypatch):
    """Workloads without kernels: int8 takes 1, 2, 4 ms and f32 4, 6, 4 ms; the peak is 500 GOP/s."""
    built = []

    def build(request):
        built.append(request)
        tier = request.isa or "avx512_vnni"
        kernels = [
            SimpleNamespace(chain="fast", columns=(0, 32)),
            SimpleNamespace(chain="exact", columns=(32, 40)),
        ]
        explanation = SimpleNamespace(tier=tier, kernel=f"k-{request.dtype}", kernels=kernels)
        return Workload(request, lambda: None, explanation)

    times = {"main": Samples((1e-3, 2e-3, 4e-3), 1), "f32": Samples((4e-3, 6e-3, 4e-3), 1)}
    monkeypatch.setattr(report, "build_workload", build)
    monkeypatch.setattr(
        report, "compare", lambda candidates, rounds: Comparison({name: times[name] for name in candidates})
    )
    monkeypatch.setattr(report, "peak_for", lambda tier, steps, threads: 500.0)
    return built


def test_figures(fakes):
    result = report.measure(Request(GemmShape(1000, 500, 400)), vs="f32")
    assert result["ms_median"] == pytest.approx(2)
    assert result["ms_min"] == pytest.approx(1)
    assert result["gops"] == pytest.approx(2 * 1000 * 500 * 400 / 2e-3 * 1e-9)
    assert result["pct_peak"] == pytest.approx(100 * result["gops"] / 500)
    assert result["vs_f32"] == pytest.approx(3)  # median of 4, 3, 1
    assert (result["isa"], result["kernel"], result["threads"]) == ("avx512_vnni", "k-u8s8", 1)
    assert (result["f32"]["isa"], result["f32"]["kernel"]) == ("avx512", "k-f32")
    assert result["chains"] == {"fast": 32, "exact": 8}
    assert fakes[1].shape == fakes[0].shape


def test_without_comparison_there_is_no_ratio(fakes):
    result = report.measure(Request(GemmShape(8, 8, 8), isa="avx2"))
    assert "vs_f32" not in result
    assert "f32" not in result
    assert len(fakes) == 1


def test_convolution_reports_both_ways_to_count(fakes):
    result = report.measure(Request(parse_conv("mb1ic64ih7oc64kh3ph1")))
    assert result["gops_without_padding"] == pytest.approx(result["gops"] * (19 / 21) ** 2)


@pytest.mark.parametrize(
    ("tier", "expected"),
    [
        ("avx512_vnni", "avx512"),
        ("avx512", "avx512"),
        ("avx_vnni", "avx2"),
        ("avx2", "avx2"),
        ("reference", "reference"),
    ],
)
def test_f32_runs_on_the_same_vectors(tier, expected):
    request = f32_request(Request(GemmShape(1, 1, 1), "u8s8", "u8", None, 2, "relu"), tier)
    assert (request.isa, request.dtype, request.out, request.threads, request.post_ops) == (
        expected,
        "f32",
        "f32",
        2,
        "relu",
    )


@pytest.mark.parametrize(("field", "value"), [("dtype", "u8u8"), ("out_dtype", "f16"), ("weights", "small")])
def test_bad_requests(field, value):
    with pytest.raises(VnnigenError, match=value):
        Request(GemmShape(1, 1, 1), **{field: value})


def test_f32_has_only_f32_output():
    with pytest.raises(VnnigenError, match="no u8 output"):
        Request(GemmShape(1, 1, 1), dtype="f32", out_dtype="u8")
