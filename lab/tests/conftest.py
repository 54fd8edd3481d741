"""Settings of the lab's tests: few threads, and a report that is made once."""

import pytest
import report_pages
import torch

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def report_inputs():
    """What a report is made from, evaluated once for all its tests."""
    return report_pages.report_inputs()
