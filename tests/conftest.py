"""Kernels run on the GPU where there is one, and without one in Triton's interpreter and on the emulated gfx942.

On several workers (pytest -n) a file's tests run on one of them, so that what it sets up is set up once.
"""

from typing import Any

import pytest
import torch

from tests.moe_ep.ways import device_of

BREAKS_A_LAB = "tests/slurm/test_faults.py"
ONE_LAB = "tests/slurm"
LONGEST = (
    BREAKS_A_LAB,
    "tests/test_end_to_end.py",
    ONE_LAB,
    "tests/engines/test_external.py",
    "tests/moe_ep/test_layer.py",
    "tests/engine/test_ranks.py",
    "tests/moe_ep/test_kernels.py",
    "tests/test_ci_examples.py",
)
"""What takes half a minute to minutes (--durations says what does) is begun first: no worker ends long after others."""


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a test's tensors live: for a test in several ways, where that way's do."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    return device_of(parameters.get("way", "reference"))


def unit(nodeid: str) -> str:
    """What stays together: a file, and the files that use one lab."""
    file = nodeid.partition("::")[0]
    return ONE_LAB if file.startswith(f"{ONE_LAB}/") and file != BREAKS_A_LAB else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Units, in the order of the collection. Another --dist than xdist's own "load" is as it says."""
    from xdist.scheduler import LoadScopeScheduling

    if config.getvalue("dist") != "load":
        return None
    config.option.loadscopereorder = False  # by number of tests, which is not how long they take

    class Units(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit(nodeid)

    return Units(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a worker the longest units first."""
    if hasattr(config, "workerinput"):
        order = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: order.get(unit(item.nodeid), len(order)))
