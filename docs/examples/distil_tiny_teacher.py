"""Distil the embedded teacher into two phase experts from Python, with the library alone.

    pip install -e ".[diffusers]"
    python docs/examples/distil_tiny_teacher.py --updates 60 --output runs/tiny_experts

This is the method without what a long run needs. ``training/distill.py`` trains with the same losses and adds
checkpoints, averages of weights, learning rates that decay, several GPUs, validations and reports.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import WanPipeline

from pdmd_core import PhasedDMDScheduler, PhasePlan, load_phased_pipeline
from pdmd_core.batch import Batch, Renoising
from pdmd_core.distillation import PhasedDistiller
from pdmd_core.experts import BaseModel, Expert, Manifest, lora_to_file, write_experts
from pdmd_core.families import Conditioning, family_of
from pdmd_core.method import Objective
from pdmd_core.roles import FAKE, Roles, RoleSpec

TEACHER = "training/embedded/models/teacher"
PROMPTS = [
    f"{thing} on a {colour} background" for thing in ("a panda", "an owl") for colour in ("blue", "red", "white")
]
SIZE, TOKENS, BATCH = 64, 16, 16
RATE, FAKE_STEPS = 1e-3, 5
OBJECTIVE = Objective(guidance_scale=3.0, fake_rollouts="whole", expert_rollouts="own_increment")  # what is sampled


def distil(updates: int, output: Path) -> None:
    """Train both phases and write the experts.

    Args:
        updates: Updates of each phase.
        output: The experts folder to write.
    """
    torch.manual_seed(0)
    pipe = WanPipeline.from_pretrained(TEACHER)
    family = family_of(type(pipe.transformer).__name__)
    plan = PhasePlan.from_steps([2, 2], shift=5.0)
    shape = family.latent_shape(pipe, SIZE, SIZE, 1)
    prompts = family.encode_prompts(pipe, PROMPTS, TOKENS)
    negative = family.encode_prompts(pipe, [""] * BATCH, TOKENS)

    spec = RoleSpec("lora", rank=16, alpha=16)  # every role is an adapter on the one frozen teacher
    roles = Roles(pipe.transformer, family, dict.fromkeys([*(phase.name for phase in plan.phases), FAKE], spec))

    def draw() -> Batch:
        rows = torch.randint(len(PROMPTS), (BATCH,))
        conditioning: Conditioning = {name: value[rows] for name, value in prompts.items()}
        return Batch(torch.randn(BATCH, *shape), conditioning, negative)

    for phase in range(len(plan)):
        roles.reset(FAKE)  # each phase starts with a fake that is the teacher
        distiller = PhasedDistiller(plan, phase, roles, OBJECTIVE)
        roles.set_trainable([distiller.expert, FAKE])
        expert, fake = (
            torch.optim.AdamW(roles.parameters(role), lr=RATE, betas=(0.0, 0.999)) for role in (distiller.expert, FAKE)
        )
        for update in range(updates):
            batch = draw()
            x_s = distiller.fake_rollout(batch, distiller.draw_step())
            for _ in range(FAKE_STEPS):  # the fake follows what the expert samples now
                renoising = Renoising(distiller.draw_score_sigma(BATCH), torch.randn_like(x_s))
                take_step(fake, distiller.fake_loss(x_s, batch.conditioning, renoising))
            batch = draw()
            rollout = distiller.expert_rollout(batch, distiller.draw_step())
            renoising = Renoising(distiller.draw_score_sigma(BATCH), torch.randn_like(x_s))
            found = distiller.generator_loss(rollout, batch, renoising)
            take_step(expert, found.loss)
            if update % 10 == 0:
                print(f"{distiller.expert} {update:4}: teacher and fake differ by {float(found.score_distance):.4f}")
        roles.set_trainable([])

    base = BaseModel(TEACHER, family.architecture, family.name)
    experts = tuple(
        Expert(
            phase.name,
            f"{phase.name}.safetensors",
            "lora",
            sha256="",  # filled in by write_experts
            rank=spec.rank,
            alpha=spec.alpha,
            targets=family.lora_targets,
        )
        for phase in plan.phases
    )
    weights = {phase.name: lora_to_file(roles.state_dict(phase.name), spec.alpha, family) for phase in plan.phases}
    training = {"size": [SIZE, SIZE, 1], "max_sequence_length": TOKENS}
    write_experts(output, Manifest(base, plan, experts, guidance_scale=1.0, training=training), weights)
    PhasedDMDScheduler.from_plan(plan).save_pretrained(output / "scheduler")


def take_step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """Take one optimizer step."""
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    """Distil, then sample with the experts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=60, help="updates of each phase (default: 60)")
    parser.add_argument("--output", type=Path, default=Path("runs/tiny_experts"), help="experts folder to write")
    options = parser.parse_args()
    distil(options.updates, options.output)
    pipe = load_phased_pipeline(options.output)
    generator = torch.Generator().manual_seed(0)
    call = {"width": SIZE, "height": SIZE, "num_frames": 1, "output_type": "pil", "generator": generator}
    picture = pipe("a panda on a blue background", **call).frames[0][0]
    picture.save(options.output / "panda.png")
    print(f"experts and a sample: {options.output}")


if __name__ == "__main__":
    main()
