"""A training run that somebody stops."""

from __future__ import annotations

from unittest import mock

import pytest

from training.loop.trainer import Trainer


def run_and_stop(trainer: Trainer, after: int) -> None:
    """As Ctrl+C between two updates, with so many done in all phases."""
    update = trainer.update

    def update_or_stop() -> dict[str, float]:
        if trainer.progress.total == after:
            raise KeyboardInterrupt
        return update()

    with mock.patch.object(trainer, "update", update_or_stop), pytest.raises(KeyboardInterrupt):
        trainer.run()
