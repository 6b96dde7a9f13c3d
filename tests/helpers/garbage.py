"""Collections of garbage that pass over what tests import: over all of it, each of the many takes half a second."""

import gc

gc.disable()  # until all is imported


def pytest_collection_finish() -> None:
    """For a conftest."""
    gc.enable()
    gc.collect()
    gc.freeze()
