"""Samples of several methods from the same prompts and noise, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from benchmarks.claims.common.methods import Run
from benchmarks.claims.embedded.study import EmbeddedStudy
from pdmd_core.experts import PhasedExperts
from training.evaluation.pictures import labelled_columns

_PICTURES, _CLIPS = (6, 3), (3, 2)
"""Scenes, and seeds of each."""
_COLOURS = 64
"""Of an animation: small files, and no colour of the emoji is lost."""

Shown = Sequence[tuple[str, Run | PhasedExperts | int]]
"""Titles, each with a run, the experts of a folder or the steps of the teacher."""


class Gallery:
    """Pictures of one study."""

    def __init__(self, study: EmbeddedStudy) -> None:
        self.study, self.clips = study, study.settings.frames > 1
        scenes, seeds = _CLIPS if self.clips else _PICTURES
        self.scenes, self.seeds = min(scenes, len(study.measuring.scenes)), min(seeds, study.measuring.seeds)
        self.captions = [scene.caption for scene in study.shown_scenes(self.scenes)]

    def write(self, folder: Path, part: str, shown: Shown) -> None:
        """Write ``<teacher>_<part>.png``, of clips their frames, and the clips themselves as .gif."""
        samples = self.samples(shown)
        path = folder / f"{self.study.teacher}_{part}.png"
        if self.clips:
            self.filmstrips(samples).save(path)
            self.animate(samples, path.with_suffix(".gif"))
        else:
            self.frame(samples, 0).save(path)

    def markdown(self, part: str, titles: Sequence[str]) -> list[str]:
        """Lines of a page beside the files."""
        name = f"{self.study.teacher}_{part}"
        lines = [f"![the same prompts and seeds: {', '.join(titles)}]({name}.{'gif' if self.clips else 'png'})", ""]
        return [*lines, f"![as filmstrips]({name}.png)", ""] if self.clips else lines

    def samples(self, shown: Shown) -> list[tuple[str, Tensor]]:
        """(title, pixels (scenes, seeds, frames, 3, 64, 64)) from the same noise."""
        pairs, found = self.study.shown_pairs(self.scenes, self.seeds), []
        for title, made in shown:
            if isinstance(made, int):
                pixels = self.study.teacher_samples(made, pairs)
            elif isinstance(made, PhasedExperts):
                pixels = self.study.samples_of(made, pairs, len(made.manifest.plan.sigmas))
            else:
                pixels = self.study.expert_samples(made, pairs)
            found.append((title, pixels.unflatten(0, (self.scenes, self.seeds))))
        return found

    def frame(self, samples: Sequence[tuple[str, Tensor]], frame: int) -> Image.Image:
        """Methods as columns, prompts as rows, the same seeds."""
        return labelled_columns([(title, pixels[:, :, frame]) for title, pixels in samples], self.captions, zoom=1)

    def filmstrips(self, samples: Sequence[tuple[str, Tensor]]) -> Image.Image:
        """Methods as rows, prompts as columns, the frames of the first seed side by side."""
        strips = torch.stack([pixels[:, 0] for _, pixels in samples])
        columns = [(caption, strips[:, i]) for i, caption in enumerate(self.captions[:2])]
        return labelled_columns(columns, [title for title, _ in samples], zoom=1)

    def animate(self, samples: Sequence[tuple[str, Tensor]], path: Path) -> None:
        """Methods as columns, prompts as rows, moving."""
        frames = [self.frame(samples, i) for i in range(self.study.settings.frames)]
        palette = frames[0].quantize(_COLOURS)
        small = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
        small[0].save(path, save_all=True, append_images=small[1:], duration=120, loop=0)
