"""The onnx package's own tests of operators: every case of every operator that the importer lists.

Each is imported, typed and computed, its answers compared, the shapes of `infer` held against those of the answers;
then once more with the inputs that say sizes (axes, shapes, ...) as constants, specialized to the data's shapes. Then
it is compiled and run: as it is, with the inputs that say sizes as constants, and with all but the first (weights).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import numpy as np
import pytest

from vnnigen.compiler import compile
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
_SMALL = "floats of 8 bits and fewer, and integers of 4 bits and fewer, are not supported"
UNSUPPORTED: dict[str, str] = {
    **dict.fromkeys(("*FLOAT8*", "*FLOAT4*", "*INT4*", "*INT2*"), _SMALL),
    **dict.fromkeys(("*antizelinear_e4m3fn*", "*antizelinear_e5m2", "*antizelinear_float4e2m1"), _SMALL),
    **dict.fromkeys(("*antizelinear_*int4", "*antizelinear_*int2"), _SMALL),
    "test_equal_string*": "tensors of text are not supported",
    "test_identity_opt": "optional values are not supported",
    "test_identity_sequence": "sequences are not supported",
    "test_batchnorm_*_training_mode": "training is not supported",
    "test_training_dropout*": "training is not supported, and whether it is wanted must be a constant",
}
#: Operators that the importer lists, the one that it reads itself, and old ones that become others.
LISTED = {*ONNX_OPERATORS, "Constant", "Scatter", "Upsample"}
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


def collected() -> list[Any]:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(collect_testcases(None))


def is_listed(model: Any) -> bool:
    return all(n.op_type in LISTED and not n.domain for n in model.graph.node)


def cases() -> list[Case]:
    found = []
    for case in COLLECTED:
        if case.data_sets and is_listed(case.model):
            inputs, outputs = case.data_sets[0]
            names = [value.name for value in case.model.graph.input]
            feeds = dict(zip(names, map(plain, inputs), strict=True))
            found.append(Case(case.name, case.model, feeds, list(map(plain, outputs)), case.rtol, case.atol))
    return found


COLLECTED = collected()
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


def sizes(graph: Graph, fed: dict[str, Array], case: Case) -> set[str]:
    """Inputs that say sizes: integers or few numbers that are not the first; all where shapes follow from the first."""
    if any(node.op in ("ConstantOfShape", "Range", "EyeLike") for node in graph) and len(graph.inputs) <= 3:
        return set(fed)
    first = next(iter(case.inputs), None)
    return {name for name, x in fed.items() if name != first and (x.dtype.kind in "iu" or x.size <= 4)}


def with_constants(graph: Graph, fed: dict[str, Array], names: set[str]) -> Graph:
    """The graph with some inputs as constants."""
    made = graph.copy()
    for name in names:
        del made.inputs[name]
        made.constants[name] = fed[name]
    return made


def imported(case: Case) -> tuple[Graph, dict[str, Array]]:
    graph = import_model(case.model)
    infer(graph)
    return graph, feeds(graph, case)


def run(case: Case) -> None:
    """In NumPy."""
    graph, fed = imported(case)
    check_shapes(graph, case, complete=False)
    check(graph, run_reference(graph, fed), case)

    special = with_constants(graph, fed, sizes(graph, fed, case))
    special = specialize(special, {name: fed[name].shape for name in special.inputs}, dynamic=True)
    check_shapes(special, case, complete=not DATA_DEPENDENT.intersection(node.op for node in graph.nodes))
    check(special, run_reference(special, {name: fed[name] for name in special.inputs}), case)


def run_compiled(case: Case) -> None:
    """As compiled networks; each set of constants once."""
    graph, fed = imported(case)
    for constants in {frozenset(), frozenset(sizes(graph, fed, case)), frozenset(list(fed)[1:])}:
        made = with_constants(graph, fed, set(constants))
        results = compile(made)({name: fed[name] for name in made.inputs})
        infer(made)
        results = results if isinstance(results, tuple) else (results,)
        check(made, dict(zip(made.outputs, results, strict=True)), case)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("computed", [run, run_compiled])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case, computed: Callable[[Case], None]) -> None:
    why = reason(case)
    if why is None:
        computed(case)
    else:
        with pytest.raises(VnnigenError):
            computed(case)


def test_operators_that_are_not_listed_are_refused() -> None:
    """Naming them, or what else such a model has that is not known; an If whose condition is no constant, too."""
    refused = [case for case in COLLECTED if not is_listed(case.model)]
    for case in refused:
        unlisted = "|".join({n.op_type for n in case.model.graph.node} - LISTED) or "domain|operator set"
        with pytest.raises(VnnigenError, match=f"{unlisted}|functions|no tensor|element type|opset_import"):
            import_model(case.model)
    assert len(refused) > 100


def test_list_is_in_use() -> None:
    idle = [pattern for pattern in UNSUPPORTED if not any(fnmatch(case.name, pattern) for case in CASES)]
    assert not idle
    assert len(CASES) > 1400, "most operators have many cases"
