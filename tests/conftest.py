"""Tests neither read nor write what is stored on this machine; kernels are the analytic ones."""

from __future__ import annotations

import os

import pytest

# Before any module's fixture generates a kernel.
os.environ["VNNIGEN_KERNEL_CACHE"] = "off"


@pytest.fixture(autouse=True)
def _no_stored_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VNNIGEN_TUNE", "off")
