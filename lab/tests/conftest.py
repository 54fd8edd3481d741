"""What the lab's tests share."""

import pytest
import report_pages
import suite_settings  # noqa: F401 - sets threads and hypothesis


@pytest.fixture(scope="session")
def report_inputs():
    """What a report is made from, evaluated once for all its tests."""
    return report_pages.report_inputs()
