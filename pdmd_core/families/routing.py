"""Which network of a teacher runs where."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TeacherRouting:
    """Which network of a teacher runs where: the first at sigma >= boundary, the second below.

    It is a property of the teacher, apart from the phase plan of the experts.

    Raises:
        ValueError: If the number of networks does not fit the boundary.
    """

    components: tuple[str, ...] = ("transformer",)
    """Names of the networks in the pipeline, one or two, high noise first."""
    boundary: float | None = None
    """Sigma from which the first network runs; None for one network."""

    def __post_init__(self) -> None:
        """Check that the number of networks fits the boundary."""
        if len(self.components) != (1 if self.boundary is None else 2):
            raise ValueError(
                f"a teacher has one network, or two and a boundary in sigma, found {', '.join(self.components)} and "
                f"boundary {self.boundary}"
            )

    def first_runs(self, sigma: Tensor) -> Tensor:
        """Tell where the first network runs.

        Args:
            sigma: Noise levels in [0, 1], of any shape.

        Returns:
            A boolean tensor of the shape of sigma.
        """
        return sigma >= (self.boundary or 0.0)

    def component_at(self, sigma: float) -> str:
        """Name the network that runs at a noise level.

        Args:
            sigma: The noise level in [0, 1].

        Returns:
            One of ``components``.
        """
        return self.components[0 if self.boundary is None or sigma >= self.boundary else 1]
