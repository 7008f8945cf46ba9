"""A recommender, Wide & Deep, and a text encoder, BERT-base, with seeded weights."""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import TensorProto

from benchmarks.models.net import LIFT, Array, Batch, Net, Value

#: Criteo's columns; a bucket of each category's hash has a row of the tables.
NUMERIC, CATEGORIES, BUCKETS, EMBEDDING = 13, 26, 1000, 32
VOCABULARY, TOKENS, HIDDEN, HEADS, LAYERS = 30522, 128, 768, 12, 12


def wide_deep(batch: Batch = "N") -> onnx.ModelProto:
    """Wide & Deep (Cheng et al. 2016) for Criteo's columns, in the size of Intel's model zoo.

    Inputs: `numeric` [N, 13] f32 and `categories` [N, 26] int64, where column c holds 1000 c + bucket.
    """
    net = Net("wide_deep", batch, seed=11)
    numeric = net.input("numeric", (NUMERIC,))
    ids = net.input("categories", (CATEGORIES,), TensorProto.INT64)
    rows = CATEGORIES * BUCKETS
    table = net.constant(net.normal(rows, EMBEDDING), "embedding")
    embedded = Value(net.op("Gather", table, ids, axis=0), (CATEGORIES, EMBEDDING))
    x = net.concat([net.reshape(embedded, CATEGORIES * EMBEDDING), numeric])
    for width in (1024, 512, 256):
        x = net.relu(net.linear(x, width, LIFT))
    weights = net.constant(0.2 * net.normal(rows, 1), "wide")
    chosen = net.reshape(Value(net.op("Gather", weights, ids, axis=0), (CATEGORIES, 1)), CATEGORIES)
    wide = Value(net.op("ReduceSum", chosen, net.constant(np.array([1], np.int64)), keepdims=1), (1,))
    logit = net.add(net.linear(x, 1), net.add(wide, net.linear(numeric, 1)))
    return net.model({"probability": net.sigmoid(logit)})


def bert(batch: Batch = "N") -> onnx.ModelProto:
    """BERT-base's encoder (Devlin et al. 2018) on 128 tokens, all of them used: `tokens` [N, 128] int64 -> features."""
    net = Net("bert", batch, seed=12)
    ids = net.input("tokens", (TOKENS,), TensorProto.INT64)
    table = net.constant(net.normal(VOCABULARY, HIDDEN), "embedding")
    position = net.constant(0.5 * net.normal(1, TOKENS, HIDDEN), "position")
    x = _layer_norm(net, net.op("Add", net.op("Gather", table, ids, axis=0), position))
    for _ in range(LAYERS):
        x = _layer_norm(net, net.op("Add", x, _attention(net, x)))
        grown = _gelu(net, _project(net, x, HIDDEN, 4 * HIDDEN))
        x = _layer_norm(net, net.op("Add", x, _project(net, grown, 4 * HIDDEN, HIDDEN)))
    return net.model({"features": Value(x, (TOKENS, HIDDEN))})


def _project(net: Net, x: str, inputs: int, outputs: int, gain: float = 1.0) -> str:
    weight: Array = net.normal(inputs, outputs) * np.float32(gain / math.sqrt(inputs))
    bias = net.constant(0.1 * net.normal(outputs))
    return net.op("Add", net.op("MatMul", x, net.constant(weight)), bias)


def _layer_norm(net: Net, x: str) -> str:
    gamma, beta = net.constant(net.spread(HIDDEN)), net.constant(0.1 * net.normal(HIDDEN))
    return net.op("LayerNormalization", x, gamma, beta, axis=-1, epsilon=1e-12)


def _gelu(net: Net, x: str) -> str:
    """As exporters write it before opset 20: x (1 + erf(x / sqrt 2)) / 2."""

    def number(value: float) -> str:
        return net.constant(np.array(value, np.float32))

    erf = net.op("Erf", net.op("Div", x, number(math.sqrt(2))))
    return net.op("Mul", net.op("Mul", x, net.op("Add", erf, number(1.0))), number(0.5))


def _attention(net: Net, x: str) -> str:
    """Multi-head self-attention with its output projection."""
    split = net.constant(np.array([0, 0, HEADS, HIDDEN // HEADS], np.int64))
    query, key, value = (net.op("Reshape", _project(net, x, HIDDEN, HIDDEN), split) for _ in range(3))
    query, value = (net.op("Transpose", y, perm=[0, 2, 1, 3]) for y in (query, value))
    key = net.op("Transpose", key, perm=[0, 2, 3, 1])
    root = net.constant(np.array(math.sqrt(HIDDEN // HEADS), np.float32))
    weights = net.op("Softmax", net.op("Div", net.op("MatMul", query, key), root), axis=-1)
    mixed = net.op("Transpose", net.op("MatMul", weights, value), perm=[0, 2, 1, 3])
    merged = net.op("Reshape", mixed, net.constant(np.array([0, 0, HIDDEN], np.int64)))
    return _project(net, merged, HIDDEN, HIDDEN)
