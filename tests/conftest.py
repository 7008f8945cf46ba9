"""Tests neither read nor write what tuning has stored on this machine: their kernels are the analytic ones."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_stored_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VNNIGEN_TUNE", "off")
