"""The command line: what reaches the benchmark, what is printed, and how errors look."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from vnnigen import cli
from vnnigen.bench.problem_string import GemmShape, parse_conv
from vnnigen.errors import ISAError, MissingExtraError
from vnnigen.runtime.peak import Peak

CONV = "mb1ic64ih56iw56oc64kh3kw3sh1sw1ph1pw1g1"
FIGURES = {
    "dtype": "u8s8", "kernel": "gemm-u8s8-6x64-avx512_vnni", "isa": "avx512_vnni", "threads": 1,
    "ms_median": 2.5, "ms_min": 2.4, "gops": 858.9, "pct_peak": 88.2,
}  # fmt: skip


def run(capsys, *args):
    """Run the command; returns exit status, stdout, stderr."""
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    out, err = capsys.readouterr()
    return caught.value.code, out, err


@pytest.fixture
def measured(monkeypatch):
    """Replaces the measurement; remembers what was asked for."""
    asked = []

    def measure(request, *, vs, rounds):
        asked.append(SimpleNamespace(request=request, vs=vs, rounds=rounds))
        f32 = {"vs_f32": 3.9, "f32": FIGURES | {"dtype": "f32", "isa": "avx512", "pct_peak": None}}
        return FIGURES | (f32 if vs else {})

    monkeypatch.setattr(cli.kernels, "measure", measure)
    return asked


def test_bench_gemm_options(measured, capsys):
    line = (
        "bench gemm --dtype s8s8 --isa avx512 -m 10 -n 20 -k 30 --threads 2 --vs f32 --post-ops "
        "relu,clip:0:6 --weights safe --out-dtype s8 --rounds 5 --json"
    )
    code, out, err = run(capsys, *line.split())
    assert (code, err) == (0, "")
    assert json.loads(out)["vs_f32"] == 3.9
    (asked,) = measured
    r = asked.request
    assert r.shape == GemmShape(10, 20, 30)
    assert (r.dtype, r.isa, r.threads, r.weights, r.out) == ("s8s8", "avx512", 2, "safe", "s8")
    assert (r.post_ops, asked.vs, asked.rounds) == ("relu,clip:0:6", "f32", 5)


def test_bench_json_has_the_promised_keys(measured, capsys):
    _, out, _ = run(capsys, "bench", "conv", "--shape", CONV, "--vs", "f32", "--json")
    assert {"ms_median", "ms_min", "gops", "pct_peak", "vs_f32", "isa", "kernel", "threads"} <= set(json.loads(out))
    assert measured[0].request.shape == parse_conv(CONV)


def test_bench_gemm_takes_a_matmul_string(measured, capsys):
    code, _, _ = run(capsys, "bench", "gemm", "--shape", "10x30:30x20")
    assert code == 0
    assert measured[0].request.shape == GemmShape(10, 20, 30)


def test_bench_table(measured, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run(capsys, "bench", "conv", "--shape", CONV, "--vs", "f32")
    assert code == 0
    for text in ("gemm-u8s8-6x64-avx512_vnni", "858.9", "88.2", "3.90", "GOP/s", "vs f32", "g1mb1ic64"):
        assert text in out


@pytest.mark.parametrize(
    ("args", "needle"),
    [
        ("bench conv --shape ic64xx", "character 5"),
        ("bench conv --shape mb1ic4id4ih4oc4kd1kh1", "3-D"),
        ("bench gemm -m 8 -n 8", "needs -m, -n and -k"),
        ("bench gemm -m 8 --shape 8x8:8x8", "not both"),
        ("bench gemm -m 8 -n 8 -k 8 --dtype u8u8", "'u8u8' is not one of"),
        ("bench gemm -m 8 -n 8 -k 8 --weights big", "'big' is not one of"),
        ("bench gemm -m 8 -n 8 -k 8 --vs bf16", "only f32"),
        ("explain conv --shape ic64", "'oc' is missing"),
    ],
)
def test_refusals_are_one_line_and_exit_2(args, needle, capsys):
    code, out, err = run(capsys, *args.split())
    assert (code, out) == (2, "")
    assert err.startswith("vnnigen: ")
    assert needle in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "args", ["bench gemm -m 0 -n 1 -k 1", "bench gemm -m x -n 1 -k 1", "bench nothing", "bench conv"]
)
def test_usage_errors_exit_2(args, capsys):
    code, out, err = run(capsys, *args.split())
    assert (code, out) == (2, "")
    assert "Usage" in err


def test_error_messages_of_several_lines_become_one(monkeypatch, capsys):
    def refuse(*_args, **_kwargs):
        raise ISAError("no tier\n  'avx9'")

    monkeypatch.setattr(cli.kernels, "measure", refuse)
    code, _, err = run(capsys, "bench", "gemm", "--shape", "1x1:1x1")
    assert (code, err) == (2, "vnnigen: no tier 'avx9'\n")


def test_probe_json(capsys):
    code, out, err = run(capsys, "probe", "--json")
    assert (code, err) == (0, "")
    machine = json.loads(out)
    assert {"name", "features", "tiers", "caches", "threads"} <= set(machine)
    assert "peaks" not in machine


def test_probe_peak(monkeypatch, capsys):
    peaks = [
        Peak("vfmadd231ps zmm", 250.0),
        Peak("vpdpbusd zmm", 1000.0),
        Peak("tdpbusd tmm", None, "not generated yet"),
    ]
    monkeypatch.setattr(cli.probe, "measure_peaks", lambda threads: {p.name: p for p in peaks})
    _, out, _ = run(capsys, "probe", "--peak", "--json")
    assert json.loads(out)["peaks"]["vpdpbusd zmm"] == {"gops": 1000.0, "why_not": None}
    code, out, _ = run(capsys, "probe", "--peak")
    assert code == 0
    for text in ("reference", "vpdpbusd zmm", "4.00", "not generated yet"):
        assert text in out


class FakeExplanation:
    def to_dict(self):
        return {"tier": "avx2"}

    def listing(self):
        return "vpaddd ymm0,ymm1,[rdi+8]  ; [bold]"

    def __str__(self):
        return "tier avx2"


@pytest.fixture
def explained(monkeypatch):
    monkeypatch.setattr(cli.kernels, "build_workload", lambda request: SimpleNamespace(explanation=FakeExplanation()))


def test_explain(explained, capsys):
    code, out, _ = run(capsys, "explain", "gemm", "--shape", "8x8:8x8")
    assert code == 0
    assert "tier avx2" in out
    assert "vpaddd" not in out


def test_explain_listing_is_verbatim(explained, capsys):
    _, out, _ = run(capsys, "explain", "conv", "--shape", CONV, "--listing")
    assert "vpaddd ymm0,ymm1,[rdi+8]  ; [bold]" in out


def test_explain_json(explained, capsys):
    _, out, _ = run(capsys, "explain", "conv", "--shape", CONV, "--json", "--listing")
    assert json.loads(out) == {"tier": "avx2", "listing": FakeExplanation().listing()}


def test_module_entry_prints_no_traceback():
    command = [sys.executable, "-m", "vnnigen", "bench", "conv", "--shape", "what"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("vnnigen: problem 'what', character 1")


def test_demo_passes_its_options(monkeypatch, capsys):
    from vnnigen.demo import report

    asked = []
    monkeypatch.setattr(report, "run_demo", lambda **options: asked.append(options))
    code, _, _ = run(capsys, "demo", "--threads", "2", "--json")
    assert code == 0
    assert asked == [{"network": "all", "threads": 2, "layers": False, "as_json": True}]


def test_demo_without_its_extra_says_what_to_install(monkeypatch, capsys):
    from vnnigen.demo import report

    def refuse(**_options):
        raise MissingExtraError("demo", "foolbox")

    monkeypatch.setattr(report, "run_demo", refuse)
    code, out, err = run(capsys, "demo")
    assert (code, out) == (2, "")
    assert "pip install 'vnnigen[demo]'" in err
