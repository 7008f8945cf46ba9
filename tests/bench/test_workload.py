"""Workloads on the real kernels: every option reaches the public API, on every tier of this machine."""

import json

import numpy as np
import pytest

import vnnigen
from vnnigen import cli
from vnnigen.bench.problem_string import GemmShape, parse_conv
from vnnigen.bench.workload import Request, build_workload
from vnnigen.errors import ISAError, QuantizationError, VnnigenError
from vnnigen.isa.tiers import why_not
from vnnigen.runtime.dispatch import candidates

CONV = parse_conv("mb1g2ic8ih9iw7oc12kh3kw2sh2sw1ph1pw0dh0dw1")
GEMM = GemmShape(5, 33, 17)
KINDS = {"u8s8": "int8", "s8s8": "int8", "bf16": "bf16", "f32": "f32"}
CASES = [(dtype, tier) for dtype, kind in KINDS.items() for tier in candidates(kind) if why_not(tier) is None]


@pytest.fixture(autouse=True)
def default_threads():
    yield
    vnnigen.set_num_threads(None)


@pytest.mark.parametrize(("dtype", "tier"), CASES)
@pytest.mark.parametrize("shape", [GEMM, CONV], ids=["gemm", "conv"])
def test_runs_on_every_tier(shape, dtype, tier):
    workload = build_workload(Request(shape, dtype, isa=tier, post_ops="relu,linear:2:1"))
    assert workload.explanation.tier == tier
    y = workload.run()
    assert y is workload.run()  # one output buffer, reused
    columns = 33 if shape is GEMM else 6  # of one group
    assert sum(workload.chains.values()) == (0 if tier == "reference" else columns)
    if dtype in ("u8s8", "s8s8"):
        reference = build_workload(Request(shape, dtype, isa="reference", post_ops="relu,linear:2:1")).run()
        np.testing.assert_array_equal(y, reference)


@pytest.mark.parametrize("out", ["u8", "s8", "s32", "f32"])
def test_output_dtypes(out):
    y = build_workload(Request(GEMM, out_dtype=out)).run()
    assert y.dtype == np.dtype({"u8": np.uint8, "s8": np.int8, "s32": np.int32, "f32": np.float32}[out])
    assert len(np.unique(y)) > 20  # the output's scale neither flattens nor saturates it
    assert y.shape == (5, 33)


@pytest.mark.skipif(("u8s8", "avx2") not in CASES, reason="needs AVX2")
@pytest.mark.parametrize(("weights", "chain"), [("safe", "fast"), ("full", "exact")])
def test_weights_decide_the_chain(weights, chain):
    workload = build_workload(Request(GemmShape(4, 64, 256), isa="avx2", weights=weights))
    assert set(workload.chains) == {chain}


def test_sum_reads_the_output_buffer():
    workload = build_workload(Request(GEMM, out_dtype="f32", post_ops="sum:0.5"))
    first = workload.run().copy()
    second = workload.run().copy()
    assert not np.array_equal(first, second)


def test_threads_are_set():
    build_workload(Request(GEMM, threads=2))
    assert vnnigen.num_threads() == 2


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (Request(GEMM, isa="avx9"), ISAError),
        (Request(GEMM, out_dtype="s32", post_ops="relu"), QuantizationError),
        (Request(GEMM, post_ops="sqrt"), VnnigenError),
    ],
)
def test_refusals_come_from_the_api(request_, error):
    with pytest.raises(error):
        build_workload(request_)


@pytest.mark.parametrize("problem", [["gemm", "-m", "8", "-n", "32", "-k", "16"], ["conv", "--shape", str(CONV)]])
def test_bench_and_explain_end_to_end(problem, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", *problem, "--vs", "f32", "--post-ops", "relu", "--rounds", "1", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["gops"] > 0
    assert result["vs_f32"] > 0
    assert result["threads"] == result["f32"]["threads"] == 1
    if result["isa"] != "reference":
        assert 0 < result["pct_peak"] < 150
    with pytest.raises(SystemExit):
        cli.main(["explain", *problem, "--listing"])
    text = capsys.readouterr().out
    assert result["isa"] in text
    assert "candidates" in text
    with pytest.raises(SystemExit):
        cli.main(["explain", *problem, "--json"])
    assert json.loads(capsys.readouterr().out)["tier"] == result["isa"]
