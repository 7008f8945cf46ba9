"""The onnx package's own tests of operators: every case of every operator that the importer lists.

Each is imported, typed and computed, its answers compared, the shapes of `infer` held against those of the answers;
then once more with the inputs that say sizes (axes, shapes, ...) as constants, specialized to the data's shapes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import numpy as np
import pytest

from vnnigen.errors import VnnigenError
from vnnigen.graph.dtypes import numpy_dtype
from vnnigen.graph.evaluate import run_reference
from vnnigen.graph.infer import infer
from vnnigen.graph.ir import Array, Graph
from vnnigen.graph.specialize import specialize

onnx = pytest.importorskip("onnx")

from vnnigen.graph.importer import import_model  # noqa: E402
from vnnigen.graph.importer_ops import ONNX_OPERATORS  # noqa: E402

#: Cases that are refused, by pattern, and why. A case in here that passes is a failure: the list stays honest.
_EMPTY = "an input without elements: the importer refuses lengths of 0"
_SMALL = "floats of 8 bits and fewer, and integers of 4 bits and fewer, are not supported"
UNSUPPORTED: dict[str, str] = {
    **dict.fromkeys(("*FLOAT8*", "*FLOAT4*", "*INT4*", "*INT2*"), _SMALL),
    **dict.fromkeys(("*antizelinear_e4m3fn*", "*antizelinear_e5m2", "*antizelinear_float4e2m1"), _SMALL),
    **dict.fromkeys(("*antizelinear_*int4", "*antizelinear_*int2"), _SMALL),
    **dict.fromkeys(("test_reduce_*_empty_set*", "test_reshape_allowzero_reordered", "test_tri?_zero"), _EMPTY),
    **dict.fromkeys(("test_split_zero_size_splits_*",), _EMPTY),
    **dict.fromkeys(("test_reduce_l*_default*", "test_reduce_mean_default*"), _EMPTY + " (here: axes)"),
    **dict.fromkeys(("test_reduce_sum*_default*", "test_reduce_sum_empty_axes_*"), _EMPTY + " (here: axes)"),
    "test_castlike_*FLOAT*_to_*": _EMPTY + " (here: the tensor of the wanted type)",
    "test_castlike_DOUBLE_to_*": _EMPTY + " (here: the tensor of the wanted type)",
    "test_equal_string*": "tensors of text are not supported",
    "test_identity_opt": "optional values are not supported",
    "test_identity_sequence": "sequences are not supported",
    "test_batchnorm_*_training_mode": "training is not supported",
    "test_training_dropout*": "training is not supported, and whether it is wanted must be a constant",
}
#: Outputs whose shapes no rule can tell from shapes and constants alone.
DATA_DEPENDENT = {"NonZero", "NonMaxSuppression", "Unique", "Compress"}
#: Half-precision models are computed in f32, so answers rounded to 11 or 8 bits are only as close as that.
TOLERANCE = {"float16": (2e-3, 2e-3), "bfloat16": (2e-2, 2e-2)}


@dataclass
class Case:
    name: str
    model: Any
    inputs: dict[str, Array]
    outputs: list[Any]
    rtol: float
    atol: float

    def __str__(self) -> str:
        return self.name


def plain(value: Any) -> Any:
    """Some cases give tensors as protobuf messages."""
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def cases() -> list[Case]:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collected = collect_testcases(None)
    found = []
    for case in collected:
        if case.data_sets and all(n.op_type in ONNX_OPERATORS and not n.domain for n in case.model.graph.node):
            inputs, outputs = case.data_sets[0]
            names = [value.name for value in case.model.graph.input]
            feeds = dict(zip(names, map(plain, inputs), strict=True))
            found.append(Case(case.name, case.model, feeds, list(map(plain, outputs)), case.rtol, case.atol))
    return found


CASES = cases()


def reason(case: Case) -> str | None:
    return next((why for pattern, why in UNSUPPORTED.items() if fnmatch(case.name, pattern)), None)


def feeds(graph: Graph, case: Case) -> dict[str, Array]:
    """The case's inputs in the types that the graph takes (floats are f32)."""
    return {name: np.asarray(case.inputs[name]).astype(numpy_dtype(t.dtype)) for name, t in graph.inputs.items()}


def check(graph: Graph, results: dict[str, Array], case: Case) -> None:
    for name, want in zip(graph.outputs, case.outputs, strict=True):
        got, expected = results[name], np.asarray(want)
        rtol, atol = TOLERANCE.get(expected.dtype.name, (case.rtol, max(case.atol, 1e-6)))
        if any(np.asarray(x).dtype.name in TOLERANCE for x in case.inputs.values()):
            rtol, atol = max(rtol, 2e-3), max(atol, 2e-3)
        assert got.shape == expected.shape
        assert got.dtype == numpy_dtype(graph.types[name].dtype), "infer's type is not the result's"
        if expected.dtype.kind in "iub" and expected.dtype.name not in TOLERANCE:
            assert got.dtype == expected.dtype
            np.testing.assert_array_equal(got, expected)
        else:
            np.testing.assert_allclose(got.astype(np.float64), expected.astype(np.float64), rtol=rtol, atol=atol)


def check_shapes(graph: Graph, case: Case, complete: bool) -> None:
    for name, want in zip(graph.outputs, case.outputs, strict=True):
        shape, expected = graph.types[name].shape, np.asarray(want).shape
        if shape is None:
            assert not complete, f"the shape of {name} is unknown"
            continue
        assert len(shape) == len(expected)
        for told, real in zip(shape, expected, strict=True):
            assert told == real or (isinstance(told, str) and not complete), f"{shape} is told, {expected} is true"


def says_sizes(name: str, x: Array, case: Case) -> bool:
    """Whether an input is one that says sizes: not the first, and integers or few numbers."""
    return name != next(iter(case.inputs)) and (x.dtype.kind in "iu" or x.size <= 4)


def run(case: Case) -> None:
    graph = import_model(case.model)
    infer(graph)
    check_shapes(graph, case, complete=False)
    fed = feeds(graph, case)
    check(graph, run_reference(graph, fed), case)

    constants = {name: x for name, x in fed.items() if says_sizes(name, x, case)}
    if len(graph.nodes) == 1 and graph.nodes[0].op in ("ConstantOfShape", "Range", "Identity", "EyeLike"):
        constants = fed
    for name, x in constants.items():
        del graph.inputs[name]
        graph.constants[name] = x
    special = specialize(graph, {name: fed[name].shape for name in graph.inputs}, dynamic=True)
    check_shapes(special, case, complete=not DATA_DEPENDENT.intersection(node.op for node in graph.nodes))
    check(special, run_reference(special, {name: fed[name] for name in special.inputs}), case)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case) -> None:
    why = reason(case)
    if why is None:
        run(case)
    else:
        with pytest.raises(VnnigenError):
            run(case)


def test_list_is_in_use() -> None:
    idle = [pattern for pattern in UNSUPPORTED if not any(fnmatch(case.name, pattern) for case in CASES)]
    assert not idle
    assert len(CASES) > 1000, "most operators have many cases"
