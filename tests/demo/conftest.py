"""What the demo's tests share: the network and the photos, where the demo's data is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from vnnigen.demo.mobilenet import mobilenet_v2
from vnnigen.demo.photos import Photo, photos, weights_path
from vnnigen.demo.torch_pickle import load_state_dict
from vnnigen.errors import MissingExtraError

T = TypeVar("T")


def or_skip(function: Callable[[], T]) -> T:
    """Call a function that needs the demo's data; `build.py test` installs it, so that nothing is skipped there."""
    try:
        return function()
    except MissingExtraError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def state() -> dict[str, Any]:
    return dict(or_skip(lambda: load_state_dict(weights_path())))


@pytest.fixture(scope="session")
def model(state: dict[str, Any]) -> Any:
    return mobilenet_v2(state)


@pytest.fixture(scope="session")
def all_photos() -> list[Photo]:
    return or_skip(photos)
