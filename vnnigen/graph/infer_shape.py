"""Rules of the operators that move or make elements."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from vnnigen.graph.attributes import array_attr, axes_of, axis_of, int_attr, ints_attr, str_attr
from vnnigen.graph.dtypes import elem_type, onnx_type
from vnnigen.graph.evaluate_shape import slice_of, split_lengths
from vnnigen.graph.infer_base import Shape, Site, broadcast, elements, rule, same_length
from vnnigen.graph.ir import Dim, TensorType


@rule("Dropout")
def dropout(site: Site) -> Sequence[TensorType]:
    return (site.type(0), TensorType("bool", site.shape(0)))


@rule("Constant")
def constant(site: Site) -> TensorType:
    value = array_attr(site.node, "value")
    if value is None:
        raise site.error("a Constant without a tensor")
    return TensorType(elem_type(value.dtype), value.shape)


@rule("Shape")
def shape(site: Site) -> TensorType:
    x = site.shape(0)
    start, end = int_attr(site.node, "start", 0), int_attr(site.node, "end", 2**31)
    return TensorType("s64", site.unknown(1) if x is None else (len(x[start:end]),))


@rule("Size")
def size(_: Site) -> TensorType:
    return TensorType("s64", ())


def _product(dims: Sequence[Dim]) -> tuple[int, list[str]]:
    """The product of lengths: a number, and the names it is yet to be multiplied with."""
    return prod(d for d in dims if isinstance(d, int)), sorted(d for d in dims if isinstance(d, str))


def _rest(site: Site, x: Shape, others: Sequence[Dim], axis: int) -> Dim:
    """The length that -1 stands for."""
    (have, names), (taken, away) = _product(x), _product(others)
    for name in away:
        if name not in names:
            return site.fresh(axis)
        names.remove(name)
    if names:
        return names[0] if len(names) == 1 and have == taken else site.fresh(axis)
    if taken == 0 or have % taken:
        raise site.error(f"{x} cannot become {(*others, -1)}")
    return have // taken


@rule("Reshape")
def reshape(site: Site) -> TensorType:
    x, target, kind = site.shape(0), site.dims(1), site.dtype(0)
    if target is None:
        length = site.shape(1, rank=1)
        known = isinstance(length[0], int) if length else False
        return TensorType(kind, site.unknown(int(length[0])) if length and known else None)
    if sum(d == -1 for d in target) > 1 or any(isinstance(d, int) and d < -1 for d in target):
        raise site.error(f"a shape of {target}")
    if x is None:
        return TensorType(kind, tuple(d if d not in (0, -1) else site.fresh(i) for i, d in enumerate(target)))
    keep = int_attr(site.node, "allowzero", 0) == 0
    if keep and any(d == 0 and i >= len(x) for i, d in enumerate(target)):
        raise site.error(f"{target} keeps dimensions that {x} does not have")
    wish = [x[i] if d == 0 and keep else d for i, d in enumerate(target)]
    if -1 in wish:
        at = wish.index(-1)
        wish[at] = _rest(site, x, wish[:at] + wish[at + 1 :], at)
    have, want = elements(x), elements(tuple(wish))
    if have is not None and want is not None and have != want:
        raise site.error(f"{x} cannot become {tuple(wish)}: {have} elements are not {want}")
    return TensorType(kind, tuple(wish))


@rule("Flatten")
def flatten(site: Site) -> TensorType:
    x = site.shape(0)
    if x is None:
        return TensorType(site.dtype(0), site.unknown(2))
    axis = int_attr(site.node, "axis", 1)
    cut = axis if axis == len(x) else axis_of(site.node, axis, max(len(x), 1))

    def together(dims: Shape, i: int) -> Dim:
        number, names = _product(dims)
        if not names:
            return number
        return names[0] if len(names) == 1 and number == 1 else site.fresh(i)

    return TensorType(site.dtype(0), (together(x[:cut], 0), together(x[cut:], 1)))


@rule("Squeeze")
def squeeze(site: Site) -> TensorType:
    x, kind = site.shape(0), site.dtype(0)
    axes = site.ints(1)
    if x is None or (site.has(1) and axes is None):
        return TensorType(kind, None)
    if axes is None:
        unsure = any(isinstance(d, str) for d in x)
        return TensorType(kind, None if unsure else tuple(d for d in x if d != 1))
    cut = axes_of(site.node, axes, len(x))
    if any(isinstance(x[a], int) and x[a] != 1 for a in cut):
        raise site.error(f"dimensions {cut} of {x} are not all 1")
    return TensorType(kind, tuple(d for i, d in enumerate(x) if i not in cut))


@rule("Unsqueeze")
def unsqueeze(site: Site) -> TensorType:
    x, axes = site.shape(0), site.ints(1)
    if x is None or axes is None:
        return TensorType(site.dtype(0), None)
    rank = len(x) + len(axes)
    new, old = axes_of(site.node, axes, rank), iter(x)
    return TensorType(site.dtype(0), tuple(1 if i in new else next(old) for i in range(rank)))


@rule("Transpose")
def transpose(site: Site) -> TensorType:
    x = site.shape(0)
    if x is None:
        return site.type(0)
    perm = ints_attr(site.node, "perm", tuple(range(len(x)))[::-1])
    if sorted(perm) != list(range(len(x))):
        raise site.error(f"perm {perm} of a tensor of shape {x}")
    return TensorType(site.dtype(0), tuple(x[p] for p in perm))


@rule("Concat")
def concat(site: Site) -> TensorType:
    shapes = [site.shape(i) for i in range(len(site.types))]
    kinds = {site.dtype(i) for i in range(len(site.types))}
    if not shapes or len(kinds) > 1:
        raise site.error(f"joins tensors of types {sorted(kinds)}")
    known = [s for s in shapes if s is not None]
    kind = site.dtype(0)
    if not known:
        return TensorType(kind, None)
    rank = len(known[0])
    axis = axis_of(site.node, int_attr(site.node, "axis", 0), rank)
    result: list[Dim] = list(known[0])
    for other in known[1:]:
        if len(other) != rank:
            raise site.error(f"joins shapes {known[0]} and {other}")
        for i in range(rank):
            if i != axis:
                result[i] = same_length(site, result[i], other[i], f"dimension {i} of {known[0]} and {other}")
    lengths = [s[axis] for s in known]
    whole = len(known) == len(shapes) and all(isinstance(d, int) for d in lengths)
    result[axis] = sum(d for d in lengths if isinstance(d, int)) if whole else site.fresh(axis)
    return TensorType(kind, tuple(result))


@rule("Split")
def split(site: Site) -> Sequence[TensorType]:
    x, kind, count = site.shape(0), site.dtype(0), len(site.node.outputs)
    if x is None:
        return [TensorType(kind, None)] * count
    axis = axis_of(site.node, int_attr(site.node, "axis", 0), len(x))
    length, given = x[axis], site.ints(1)
    sizes: Sequence[Dim]
    if site.has(1) and given is not None:
        sizes = given
        if isinstance(length, int) and sum(given) != length:
            raise site.error(f"cannot split {length} into {given}")
    elif site.has(1) or not isinstance(length, int):
        sizes = [site.fresh(axis, i) for i in range(count)]
    else:
        sizes = split_lengths(site.node, length)
    if len(sizes) != count or any(isinstance(s, int) and s < 0 for s in sizes):
        raise site.error(f"cannot split {length} into {tuple(sizes)} for {count} outputs")
    return [TensorType(kind, (*x[:axis], s, *x[axis + 1 :])) for s in sizes]


@rule("Slice")
def slice_(site: Site) -> TensorType:
    x, kind = site.shape(0), site.dtype(0)
    starts, ends = site.dims(1), site.dims(2)
    axes = site.ints(3) if site.has(3) else None if x is None else tuple(range(len(starts or x)))
    if x is None:
        return TensorType(kind, None)
    if axes is None:
        return TensorType(kind, site.unknown(len(x)))
    steps = site.ints(4) if site.has(4) else (1,) * len(axes)
    if starts is not None and any(v is not None and len(v) != len(axes) for v in (starts, ends, steps)):
        raise site.error(f"{len(axes)} axes, but starts {starts}, ends {ends}, steps {steps}")
    result = list(x)
    for n, axis in enumerate(axes_of(site.node, axes, len(x))):
        if starts is None or ends is None or steps is None:
            result[axis] = site.fresh(axis)
            continue
        result[axis] = _sliced(site, x[axis], starts[n], ends[n], steps[n], axis)
    return TensorType(kind, tuple(result))


def _sliced(site: Site, length: Dim, start: Dim, end: Dim, step: int, axis: int) -> Dim:
    if step == 0:
        raise site.error("a step of 0")
    if isinstance(length, int) and isinstance(start, int) and isinstance(end, int):
        return len(range(*slice_of(start, end, step).indices(length)))
    if start == 0 and step == 1:  # through the end, or as far as a length that has a name
        if isinstance(end, str):
            return end
        if end >= 2**31 - 1:
            return length
    return site.fresh(axis)


@rule("Gather")
def gather(site: Site) -> TensorType:
    x, indices = site.shape(0), site.shape(1)
    if x is None or indices is None:
        return TensorType(site.dtype(0), None)
    axis = axis_of(site.node, int_attr(site.node, "axis", 0), len(x))
    length, wanted = x[axis], site.ints(1)
    if wanted and isinstance(length, int) and not (-length <= min(wanted) and max(wanted) < length):
        raise site.error(f"indices from {min(wanted)} to {max(wanted)} of a dimension of {length}")
    return TensorType(site.dtype(0), (*x[:axis], *indices, *x[axis + 1 :]))


@rule("GatherElements")
def gather_elements(site: Site) -> TensorType:
    return TensorType(site.dtype(0), site.shape(1))


@rule("GatherND")
def gather_nd(site: Site) -> TensorType:
    x, indices, batch = site.shape(0), site.shape(1), int_attr(site.node, "batch_dims", 0)
    if x is None or indices is None or not isinstance(indices[-1], int):
        return TensorType(site.dtype(0), None)
    if indices[-1] + batch > len(x):
        raise site.error(f"indices of {indices[-1]} numbers into {x}")
    return TensorType(site.dtype(0), (*indices[:-1], *x[indices[-1] + batch :]))


@rule("ScatterElements", "ScatterND")
def scatter(site: Site) -> TensorType:
    return site.type(0)


@rule("Expand")
def expand(site: Site) -> TensorType:
    target = site.dims(1)
    return TensorType(site.dtype(0), None if target is None else broadcast(site, site.shape(0), target))


@rule("Tile")
def tile(site: Site) -> TensorType:
    x, repeats = site.shape(0), site.ints(1)
    if x is None:
        return site.type(0)
    if repeats is None:
        return TensorType(site.dtype(0), site.unknown(len(x)))
    if len(repeats) != len(x) or min(repeats, default=0) < 0:
        raise site.error(f"repeats {repeats} of {x}")
    grown = (d * r if isinstance(d, int) else (d if r == 1 else site.fresh(i))
             for i, (d, r) in enumerate(zip(x, repeats, strict=True)))  # fmt: skip
    return TensorType(site.dtype(0), tuple(grown))


@rule("ConstantOfShape")
def constant_of_shape(site: Site) -> TensorType:
    value, target = array_attr(site.node, "value"), site.dims(0)
    if target is None:
        rank = site.shape(0, rank=1)
        target = site.unknown(rank[0]) if rank and isinstance(rank[0], int) else None
    if target is not None and any(isinstance(d, int) and d < 0 for d in target):
        raise site.error(f"a shape of {target}")
    return TensorType("f32" if value is None else elem_type(value.dtype), target)


@rule("Range")
def range_(site: Site) -> TensorType:
    numbers = [site.value(i) for i in range(3)]
    length: Dim = site.fresh(0)
    if all(n is not None and n.dtype.kind != "O" for n in numbers):
        start, limit, delta = (n.reshape(()).item() for n in numbers if n is not None)
        if delta == 0:
            raise site.error("a step of 0")
        length = max(int(-((start - limit) // delta)), 0)
    return TensorType(site.dtype(0), (length,))


@rule("Cast")
def cast(site: Site) -> TensorType:
    return TensorType(onnx_type(int_attr(site.node, "to", 0)), site.shape(0))


@rule("CastLike")
def cast_like(site: Site) -> TensorType:
    return TensorType(site.dtype(1), site.shape(0))


@rule("Where")
def where(site: Site) -> TensorType:
    return TensorType(site.dtype(1), broadcast(site, site.shape(0), site.shape(1), site.shape(2)))


@rule("Pad")
def pad(site: Site) -> TensorType:
    x, pads = site.shape(0), site.ints(1)
    if x is None:
        return site.type(0)
    axes = site.ints(3) if site.has(3) else tuple(range(len(x)))
    if pads is None or axes is None:
        return TensorType(site.dtype(0), site.unknown(len(x)))
    if len(pads) != 2 * len(axes):
        raise site.error(f"pads {pads} for {len(axes)} dimensions")
    result = list(x)
    for i, axis in enumerate(axes_of(site.node, axes, len(x))):
        total, length = pads[i] + pads[i + len(axes)], x[axis]
        if isinstance(length, int):
            result[axis] = length + total
            if length + total < 0:
                raise site.error(f"cuts {-total} from a dimension of {length}")
            if str_attr(site.node, "mode", "constant") == "reflect" and max(pads[i], pads[i + len(axes)]) >= length:
                raise site.error(f"reflects {pads} of {x}, which is shorter")
        elif total:
            result[axis] = site.fresh(axis)
    return TensorType(site.dtype(0), tuple(result))


@rule("DepthToSpace", "SpaceToDepth")
def blocks(site: Site) -> TensorType:
    x, b = site.shape(0, rank=4), int_attr(site.node, "blocksize", 0)
    if x is None:
        return TensorType(site.dtype(0), site.unknown(4))
    if b < 1:
        raise site.error(f"blocksize {b}")
    out: list[Dim] = [x[0]]
    grows = (False, True, True) if site.node.op == "DepthToSpace" else (True, False, False)
    for i, (length, up) in enumerate(zip(x[1:], grows, strict=True), start=1):
        factor = b * b if i == 1 else b
        if not isinstance(length, int):
            out.append(site.fresh(i))
        elif not up and length % factor:
            raise site.error(f"dimension {i} of {x} is no multiple of {factor}")
        else:
            out.append(length * factor if up else length // factor)
    return TensorType(site.dtype(0), tuple(out))
