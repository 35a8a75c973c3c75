"""What every test needs: the zoo on the path, and one thread for each of pytest's workers."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
# Two workers with two threads each on two cores wait for each other: a forward takes 100 times as long.
torch.set_num_threads(1)


LARGE = {"hub_t5", "swin"}
"""Models that take a tenth of all time: `make test` divides them and leaves the rest to `make test-all`."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one model of the zoo go to one worker (``--dist loadgroup``), which traces it once for all."""
    for item in items:
        call = getattr(item, "callspec", None)
        name = call.params.get("name") if call else None
        if isinstance(name, str):
            item.add_marker(pytest.mark.xdist_group(name))
            if name in LARGE and item.path.name != "test_zoo.py":
                item.add_marker(pytest.mark.zoo)
