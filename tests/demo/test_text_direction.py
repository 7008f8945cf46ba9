"""The text direction classifier on lines that are hard to read."""

from __future__ import annotations

import numpy as np
import pytest

from tests.demo.conftest import or_skip
from vnnigen.demo import text_direction


def test_lines_are_what_they_say() -> None:
    lines, labels = or_skip(lambda: text_direction.lines(40, seed=5))
    assert lines.shape == (40, 3, 48, 192)
    assert (labels == np.arange(40) % 2).all()
    assert np.abs(lines).max() <= 1
    assert (lines[:, 0] == lines[:, 2]).all()
    again, _ = text_direction.lines(40, seed=5)
    np.testing.assert_array_equal(lines, again)
    other, _ = text_direction.lines(40, seed=6)
    assert (lines != other).any()
    assert (lines[:, 0].std(axis=(1, 2)) > 0.02).all()  # there is something to see


def test_int8_is_within_one_percent() -> None:
    found, int8 = or_skip(lambda: text_direction.run(images=600, rounds=1))
    assert found.images == 600
    assert 0.8 < found.f32.top1 / 600 < 0.99  # neither hopeless nor saturated
    assert found.lost <= 0.01
    assert found.agreement >= 0.96
    precisions = [n.precision for n in int8.graph if n.op in ("Conv", "Linear")]
    assert precisions.count("int8") == len(precisions)


def test_scores_do_not_saturate() -> None:
    from vnnigen import compile as compile_model
    from vnnigen.demo.wheels import wheel_file

    model = or_skip(lambda: wheel_file(text_direction.WHEEL, text_direction.FILE))
    scores = compile_model(model)(or_skip(lambda: text_direction.lines(100, seed=9))[0]).max(axis=1)
    assert np.median(scores) < 0.9999
    assert (scores < 0.95).mean() > 0.1


def test_missing_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    from vnnigen.errors import MissingExtraError

    monkeypatch.setattr(text_direction, "WHEEL", "no-such-wheel")
    with pytest.raises(MissingExtraError, match=r"python build\.py demo"):
        text_direction.run()
