"""All monitors of a run as one, which can never stop it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from accelerate import Accelerator
from torch import Tensor

from training.config.schema import DistillConfig
from training.monitoring.feature_statistics import FeatureStatistics
from training.monitoring.metrics_log import Metrics
from training.monitoring.monitor import Monitor, UpdateReport, Validation, warn
from training.monitoring.observer import Observer
from training.monitoring.sample_statistics import SampleStatistics
from training.monitoring.trackers import Tracking


class Monitors:
    """Monitors that are told one after the other. A failure is a warning, said once: no run ends because of a plot.

    Args:
        monitors: Those that are told.
    """

    def __init__(self, monitors: Sequence[Monitor]) -> None:
        self.monitors = list(monitors)
        self._said: set[str] = set()

    def start(self, update: int) -> None:
        """Tell that the run goes on after this update."""
        self._each(lambda monitor: monitor.start(update))

    def start_phase(self, expert: str, parameters: Sequence[Tensor]) -> None:
        """Tell that an expert begins to train, or goes on to."""
        self._each(lambda monitor: monitor.start_phase(expert, parameters))

    def after_update(self, report: UpdateReport) -> None:
        """Tell what an update did."""
        self._each(lambda monitor: monitor.after_update(report))

    def teacher(
        self, phase: str, pixels: Tensor, statistics: SampleStatistics, features: FeatureStatistics | None
    ) -> None:
        """Show the teacher's samples as they look from the end of a phase."""
        self._each(lambda monitor: monitor.teacher(phase, pixels, statistics, features))

    def validation(self, shown: Validation) -> None:
        """Show the samples of a validation."""
        self._each(lambda monitor: monitor.validation(shown))

    def reason_to_stop(self) -> str | None:
        """Why the run should stop, in a line, as a monitor says; None while it should go on."""
        return next((m.reason_to_stop for m in self.monitors if isinstance(m, Observer) and m.reason_to_stop), None)

    def finish(self) -> None:
        """Tell that the run ends."""
        self._each(lambda monitor: monitor.finish())

    def _each(self, tell: Callable[[Monitor], None]) -> None:
        for monitor in self.monitors:
            try:
                tell(monitor)
            except Exception as error:
                text = f"{type(monitor).__name__} failed, the run goes on: {type(error).__name__}: {error}"
                if text not in self._said:
                    self._said.add(text)
                    warn(" ".join(text.split()))


def monitors_of(config: DistillConfig, accelerator: Accelerator) -> Monitors:
    """Make everything that watches a run of this configuration.

    Args:
        config: The configuration of the run.
        accelerator: Its device and processes; only the main process monitors.

    Returns:
        The monitors as one.
    """
    if not accelerator.is_main_process:
        return Monitors([])
    tracking = Tracking(config, accelerator)
    return Monitors([Metrics(config, tracking), Observer(config, accelerator.device, tracking)])
