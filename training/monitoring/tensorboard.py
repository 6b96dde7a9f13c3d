"""What TensorBoard is shown beside numbers: where scores were compared, samples, the configuration."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[attr-defined]
from torch.utils.tensorboard import SummaryWriter

from training.config.schema import DistillConfig


class Board:
    """Writes to the log of accelerate's tracker."""

    def __init__(self, writer: SummaryWriter) -> None:
        self.writer = writer

    def configuration(self, config: DistillConfig) -> None:
        """As a text."""
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        self.writer.add_text("config", "    " + text.replace("\n", "\n    "))

    def histograms(self, values: dict[str, list[float]], update: int) -> None:
        """Of the sigmas drawn since the last time, by what was trained there."""
        for name, numbers in values.items():
            if numbers:
                self.writer.add_histogram(f"score_sigmas/{name}", np.asarray(numbers), update)

    def picture(self, tag: str, path: Path, update: int) -> None:
        """A picture or an animation as it lies on disk; TensorBoard plays GIFs in its image tab."""
        with Image.open(path) as image:
            width, height = image.size
            encoded = path.read_bytes()
            if path.suffix not in (".png", ".gif"):
                stream = io.BytesIO()
                image.convert("RGB").save(stream, "png")
                encoded = stream.getvalue()
        shown = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=encoded)
        if self.writer.file_writer is not None:
            self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=shown)]), update)
