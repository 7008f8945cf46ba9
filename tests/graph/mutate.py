"""Damage models: bytes of files, and fields of messages."""

from __future__ import annotations

from random import Random
from typing import Any

#: Values of integers that matter to lengths, enumerations and offsets.
INTEGERS = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 7, 8, 11, 16, 255, 2**31 - 1, 2**31, 2**40, 2**63 - 1)
REALS = (0.0, -1.0, 1e30, float("nan"), float("inf"))
NAMES = (b"", b"x", b"\xff\xfe", b"Conv", b"If", b"Constant", b"axis", b"com.microsoft", b"a/../b")


def damaged_bytes(rng: Random, data: bytes) -> bytes:
    """Cut, flip bits, overwrite, remove or repeat a run of bytes."""
    made = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(made) + 1)
        run = rng.choice((1, 2, 8, 64))
        kind = rng.randrange(5)
        if kind == 0 and made:
            del made[at:]
        elif kind == 1 and at < len(made):
            made[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            made[at : at + run] = bytes(rng.randrange(256) for _ in range(run))
        elif kind == 3:
            del made[at : at + run]
        else:
            made[at:at] = made[at : at + run]
    return bytes(made)


def _messages(message: Any, found: list[Any]) -> list[Any]:
    found.append(message)
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if field.is_repeated else [value]:
                _messages(inner, found)
    return found


def _scalar(rng: Random, field: Any, old: Any) -> Any:
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return rng.choice(REALS)
    if field.cpp_type == field.CPPTYPE_STRING:
        return rng.choice(NAMES) if field.type == field.TYPE_BYTES else rng.choice(NAMES[:2] + NAMES[3:]).decode()
    if field.cpp_type == field.CPPTYPE_ENUM:
        return rng.choice([v.number for v in field.enum_type.values])
    if field.cpp_type == field.CPPTYPE_BOOL:
        return not old
    value = rng.choice(INTEGERS)
    return max(-(2**31), min(value, 2**31 - 1)) if field.cpp_type == field.CPPTYPE_INT32 else value % 2**64 if (
        field.cpp_type == field.CPPTYPE_UINT64) else value  # fmt: skip


def damage_fields(rng: Random, model: Any) -> None:
    """Change one to three fields anywhere in a model: other values, missing, repeated, exchanged with a like one."""
    for _ in range(rng.randint(1, 3)):
        messages = _messages(model, [])
        message = rng.choice(messages)
        fields = message.DESCRIPTOR.fields
        field = rng.choice(fields)
        kind = rng.randrange(5)
        if kind == 0:
            message.ClearField(field.name)
        elif kind == 1:
            like = [m for m in messages if m.DESCRIPTOR is message.DESCRIPTOR]
            other = type(message)()
            other.CopyFrom(rng.choice(like))
            message.CopyFrom(other)
        elif field.is_repeated:
            _damage_list(rng, field, getattr(message, field.name))
        elif field.message_type is None:
            setattr(message, field.name, _scalar(rng, field, getattr(message, field.name)))
        else:
            getattr(message, field.name).SetInParent()


def _damage_list(rng: Random, field: Any, items: Any) -> None:
    at = rng.randrange(len(items)) if items else 0
    kind = rng.randrange(4)
    if kind == 0 and items:
        del items[at]
    elif field.message_type is not None:
        new = items.add()
        if items and kind != 1:
            new.CopyFrom(items[at])
    elif kind == 1 and items:
        items.append(items[at])
    elif items and kind == 2:
        items[at] = _scalar(rng, field, items[at])
    else:
        items.append(_scalar(rng, field, 0))
