"""Every family, in every kind of pipeline it has: our loop is the stock pipeline's own call, step by step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pdmd_core.families import family_of
from pdmd_core.phases import PhasePlan
from pdmd_core.roles import TEACHER, Roles
from pdmd_core.rollout import sample
from pdmd_core.scheduler import PhasedDMDScheduler
from pdmd_core.velocities import guided_velocity
from tests.helpers.families.case import Case
from tests.helpers.families.cases import OF_FAMILIES as CASES
from tests.helpers.families.parts import spread, use_all_colours
from tests.helpers.tiny import randn

PLAN = PhasePlan.from_steps([2, 2], shift=5.0)
NEGATIVE = "blurry and dull"
GUIDANCE = 3.0
LONGEST = {"prompt": 512, "glyph_": 20}
"""Tokens to which prompts with a mask are padded."""
every_case = pytest.mark.parametrize("name", CASES)


@dataclass
class Taught:
    """A pipeline, its networks as roles without experts, and the conditioning of the case's prompt and NEGATIVE."""

    case: Case
    pipeline: Any
    roles: Roles
    conditioning: dict[str, Tensor]
    negative: dict[str, Tensor]
    output_type: str = "latent"

    @property
    def noise(self) -> Tensor:
        return randn(1, *self.roles.family.latent_shape(self.pipeline, *self.case.size))

    def stock(self, guidance: float) -> Tensor:
        """The latents of the pipeline's own call with our noise and sigmas, as latents of our shape."""
        call = {**self.case.call, **self.case.guide(self.pipeline, guidance)}
        if guidance != 1 and self.case.takes("negative_prompt"):
            call["negative_prompt"] = NEGATIVE
        self.pipeline.scheduler = PhasedDMDScheduler.from_plan(PLAN)
        generator = torch.Generator().manual_seed(0)
        steps = len(PLAN.sigmas)
        sampled = self.pipeline(**call, num_inference_steps=steps, generator=generator, output_type=self.output_type)
        return self.case.result(self.pipeline, sampled) if self.output_type == "latent" else sampled[0]

    def own(self, guidance: float) -> Tensor:
        def velocity(x: Tensor, sigma: float) -> Tensor:
            return guided_velocity(self.roles, x, sigma, self.conditioning, self.negative, guidance)

        return sample(velocity, PLAN.sigmas, self.noise)


@torch.no_grad()
def taught(name: str) -> Taught:
    case = CASES[name]
    pipeline = case.build()
    for part, strength in (("transformer", 0.2), ("transformer_2", 0.2), ("text_encoder", 0.5), ("image_encoder", 0.5)):
        spread(getattr(pipeline, part, None), strength)
    found = family_of(type(pipeline.transformer).__name__)
    images = [case.picture] if case.takes("image") else None
    seen = images if found.prompts_see_images(pipeline) else None
    conditioning, negative = (
        _padded(found.encode_prompts(pipeline, [text], case.tokens, seen))
        for text in (case.prompt, NEGATIVE if case.takes("negative_prompt") or not case.guided else "")
    )
    if images is not None:
        if case.last_image:
            beside = found.encode_first_and_last(pipeline, images, [case.last_picture], *case.size)
        else:
            beside = found.encode_images(pipeline, images, *case.size)
        conditioning, negative = conditioning | beside, negative | beside
    routing = found.teacher_routing(pipeline.config)
    networks = {component: getattr(pipeline, component) for component in routing.components}
    return Taught(case, pipeline, Roles(networks, found, {}, routing), conditioning, negative)


def _padded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """To a common length where there is a mask, as for training."""
    if "prompt_mask" not in tensors:
        return tensors
    return {
        name: functional.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, LONGEST[name[:6]] - tensor.shape[1]))
        for name, tensor in tensors.items()
    }


@every_case
@pytest.mark.parametrize("guidance", [1.0, GUIDANCE])
@torch.no_grad()
def test_our_loop_samples_what_the_stock_pipeline_samples(name: str, guidance: float) -> None:
    """No guidance, in the words of the pipeline's call, is one evaluation a step; guidance is two."""
    teacher, evaluated = taught(name), list[int]()
    if guidance != 1 and not teacher.case.guided:
        with pytest.raises(ValueError, match="has no classifier-free guidance"):
            teacher.stock(guidance)
        return
    own = teacher.own(guidance)
    for network in teacher.roles.networks():
        network.register_forward_pre_hook(
            lambda n, args, kwargs: evaluated.append(len(args[0] if args else kwargs["hidden_states"])),
            with_kwargs=True,
        )
    stock = teacher.stock(guidance)
    assert own.shape == stock.shape
    torch.testing.assert_close(own, stock, rtol=1e-5, atol=1e-4)
    assert sum(evaluated) == len(PLAN.sigmas) * (1 if guidance == 1 else 2)


@every_case
@torch.no_grad()
def test_every_part_of_the_conditioning_matters(name: str) -> None:
    teacher = taught(name)
    config, tokens = teacher.pipeline.transformer.config, teacher.conditioning["prompt_embeds"].shape[1]
    latent = teacher.noise.shape[1:]
    shapes = teacher.roles.family.conditioning_shapes(config, tokens, latent)
    if teacher.case.takes("image"):
        shapes |= teacher.roles.family.image_shapes(teacher.pipeline, latent)
    assert set(shapes) == set(teacher.conditioning)
    for key, shape in shapes.items():
        found = teacher.conditioning[key].shape[1:]
        fewer = key in (
            "image_embeds",
            "glyph_embeds",
            "glyph_mask",
        )  # CLIP sees a smaller image here, little is quoted
        assert found == shape or (fewer and found[1:] == shape[1:])
    expected = teacher.own(1.0)
    changed = {
        key: teacher.negative[key] if "prompt" in key else randn(*value.shape, seed=1)
        for key, value in teacher.conditioning.items()
    }
    for key in teacher.conditioning.keys() - {"prompt_mask"}:
        other = replace(teacher, conditioning=teacher.conditioning | {key: changed[key]})
        assert (other.own(1.0) - expected).abs().max() > 1e-2, key
    assert (teacher.own(GUIDANCE) - expected).abs().max() > 1e-2


@every_case
@torch.no_grad()
def test_samples_of_a_batch_do_not_depend_on_each_other(name: str) -> None:
    """Own sigma, prompt, negative prompt and image for each; both networks of two are asked."""
    teacher = taught(name)
    x = torch.cat([teacher.noise, teacher.noise.flip(-1), 0.5 * teacher.noise])
    sigmas = torch.tensor([0.95, 0.3, 0.9])
    rows = [teacher.conditioning, teacher.negative, teacher.conditioning]
    conditioning = {key: torch.cat([row[key] for row in rows]) for key in teacher.conditioning}
    together = teacher.roles.velocity(TEACHER, x, sigmas, conditioning)
    for i, row in enumerate(rows):
        alone = teacher.roles.velocity(TEACHER, x[i : i + 1], float(sigmas[i]), row)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)
        others = teacher.roles.velocity(TEACHER, x[i : i + 1], float(sigmas[i - 1]), row)
        assert (together[i] - others).abs().max() > 1e-2


@every_case
@torch.no_grad()
def test_decoding_is_the_pipeline_s_own(name: str) -> None:
    teacher = taught(name)
    use_all_colours(teacher.pipeline.vae)
    latents = teacher.stock(1.0)
    with mock.patch.object(teacher, "output_type", "pt"):
        expected = teacher.stock(1.0)
    found = teacher.roles.family.decode(teacher.pipeline, latents)
    assert found.shape == (1, teacher.case.size[2], 3, *teacher.case.size[:2])
    assert found.min() < 0.1 and found.max() > 0.9
    torch.testing.assert_close(found, expected.reshape(found.shape), rtol=1e-5, atol=teacher.case.decoded_within)


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("wan_5b", (48, 64, 5), "multiples of 32, found 64x48"),
        ("wan_image_to_video", (32, 24, 5), "multiples of 16, found 24x32"),
        ("qwen_image", (20, 32, 1), "multiples of 8, found 32x20"),
        ("qwen_image", (32, 0, 1), "multiples of 8, found 0x32"),
        ("qwen_image", (32, 32, 5), "1 frame, found 5"),
        ("z_image", (34, 32, 1), "multiples of 4, found 32x34"),
        ("z_image", (32, 32, 5), "1 frame, found 5"),
    ],
)
def test_a_size_that_the_model_does_not_have_is_one_line(name: str, size: tuple[int, int, int], words: str) -> None:
    pipeline = CASES[name].build()
    with pytest.raises(ValueError, match=words) as caught:
        family_of(type(pipeline.transformer).__name__).latent_shape(pipeline, *size)
    assert len(str(caught.value).splitlines()) == 1


def test_only_pipelines_of_images_take_one() -> None:
    taking, needing = set(), set()
    for name, case in CASES.items():
        pipeline = case.build()
        found = family_of(type(pipeline.transformer).__name__)
        taking |= {name} if found.takes_image(pipeline) else set()
        needing |= {name} if found.needs_image(pipeline) else set()
    assert taking - needing == {"flux2", "flux2_klein", "flux2_edit", "flux2_klein_edit"}
    assert needing == {name for name in CASES if ("image_to_video" in name or "edit" in name) and "flux2" not in name}
