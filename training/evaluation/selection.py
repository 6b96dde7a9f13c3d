"""Which metrics are measured in which features, by what was asked for and by what the samples allow."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from training.config.command_line import UserError
from training.evaluation.comparison import METRICS
from training.evaluation.evaluation import Evaluation
from training.evaluation.measures import (
    EMOJI_SIDE,
    EmojiSpace,
    FeatureSpace,
    Measure,
    MotionMeasure,
    Preview,
    all_name_emoji,
    load_image_reward,
    load_lpips,
    load_space,
    wanted_classes,
)
from training.evaluation.quantities import Setting, inapplicable, shortage
from training.evaluation.request import Request
from training.evaluation.sampler import default_device


@dataclass(frozen=True)
class Selection:
    """What is measured."""

    setting: Setting
    """What all methods share."""
    metrics: Sequence[str]
    """Names of the metrics, in the order of a report."""
    left_out: Mapping[str, str]
    """Metrics that would apply, each with what there is too little of."""

    @property
    def compares(self) -> bool:
        """Whether a metric compares with samples of the reference."""
        return any(METRICS[name].to_teacher for name in self.metrics)

    @property
    def measures(self) -> list[Measure]:
        """What is measured of each sample."""
        motion = any(METRICS[name].of_motion for name in self.metrics)
        reward = [] if self.setting.reward is None else [self.setting.reward]
        return [*self.setting.spaces, Preview(), *([MotionMeasure()] if motion else []), *reward]


def select(request: Request, evaluation: Evaluation) -> Selection:
    """Choose metrics and load the networks that they need.

    Args:
        request: What was asked for.
        evaluation: Prompts, seeds and size of the samples.

    Raises:
        UserError: When a metric or a network was asked for that does not apply or is not there.
    """
    asked = request.metrics
    unknown = [name for name in asked or () if name not in METRICS]
    if unknown:
        raise UserError(f"--metrics: unknown {', '.join(unknown)}, expected some of: {', '.join(METRICS)}")
    wished = [name for name in METRICS if asked is None or name in asked]
    size, prompts = evaluation.size, [example.prompt for example in evaluation.examples]
    device = default_device(request.device)
    in_features = any(METRICS[name].in_features for name in wished)
    spaces = _spaces(request, evaluation, prompts, device) if in_features else []
    wanted = None
    given = {"lpips": request.lpips_weights, "image_reward": request.image_reward, "data": request.data}
    has = {name for name, value in given.items() if value is not None}
    for space in spaces:
        if isinstance(space, EmojiSpace):
            wanted = torch.stack(wanted_classes(prompts, space.emoji, space.backgrounds), dim=1)
            has |= {"classifier"} if bool((wanted >= 0).any()) else set()
    chosen, left_out = [], {}
    for name in wished:
        reason = inapplicable(METRICS[name], size.frames, has)
        short = shortage(METRICS[name], len(prompts), request.seeds)
        if asked is not None and (reason or short):
            raise UserError(f"--metrics {name}: {reason or short}")
        if reason is None and short is None:
            chosen.append(name)
        elif reason is None and short is not None:
            left_out[name] = short
    if any(METRICS[name].of_motion for name in chosen) and importlib.util.find_spec("cv2") is None:
        raise UserError('motion needs OpenCV: pip install "phased-dmd[metrics]", or choose other --metrics')
    lpips = None
    if request.lpips_weights is not None and "lpips" in chosen:
        backbone, heads = request.lpips_weights
        lpips = load_lpips(backbone, heads, device)
    reward = None
    if request.image_reward is not None and "image_reward" in chosen:
        reward = load_image_reward(request.image_reward, evaluation.hashes, device)
    setting = Setting(len(prompts), request.seeds, size.frames, spaces, wanted, lpips, None, reward)
    return Selection(setting, chosen, left_out)


def _spaces(
    request: Request, evaluation: Evaluation, prompts: Sequence[str], device: torch.device
) -> list[FeatureSpace]:
    size, names = evaluation.size, request.features
    small = (size.height, size.width) == (EMOJI_SIDE, EMOJI_SIDE)
    if names is None:
        names = ["emoji" if small and all_name_emoji(prompts) else "efflite0"]
        names += [] if request.dino_weights is None else ["dinov3"]
    if "emoji" in names and not small:
        raise UserError(f"--features emoji is for samples of 64x64 pixels, found {size.width}x{size.height}")
    return [load_space(name, request.dino_weights, evaluation.hashes, device) for name in dict.fromkeys(names)]
