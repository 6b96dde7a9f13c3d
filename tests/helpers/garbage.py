"""Collections of garbage that pass over what tests import: over all of it, each of the many takes half a second."""

import gc


def pytest_collectstart() -> None:
    """For a conftest: none while tests are imported."""
    gc.disable()


def pytest_collection_finish() -> None:
    """For a conftest: what was imported stays."""
    gc.enable()
    gc.collect()
    gc.freeze()
