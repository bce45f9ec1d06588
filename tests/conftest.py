"""Kernels run on the GPU where there is one, and without one in Triton's interpreter and on the emulated gfx942."""

import pytest
import torch

from tests.moe_ep.ways import device_of


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a test's tensors live: for a test in several ways, where that way's do."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    return device_of(parameters.get("way", "reference"))
