"""Recipes in here may name the small network."""

from collections.abc import Iterator

import pytest

from tests.training import small


@pytest.fixture(autouse=True, scope="module")
def _small_network() -> Iterator[None]:
    with small.known():
        yield
