"""What the demo's tests share: the network and the photos, where the demo's data is installed."""

from __future__ import annotations

import pytest

from vnnigen.demo.mobilenet import Network, mobilenet_v2
from vnnigen.demo.photos import Photo, photos, weights_path
from vnnigen.demo.torch_pickle import load_state_dict
from vnnigen.errors import MissingExtraError


@pytest.fixture(scope="session")
def network() -> Network:
    try:
        return mobilenet_v2(load_state_dict(weights_path()))
    except MissingExtraError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def all_photos() -> list[Photo]:
    try:
        return photos()
    except MissingExtraError as error:
        pytest.skip(str(error))
