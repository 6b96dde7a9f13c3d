"""Context parallelism: what it refuses, who shares a sample. Its numbers are those that test_processes.py compares."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers.models.attention_dispatch import attention_backend
from torch.testing._internal.distributed.fake_pg import FakeStore

from pdmd_core.families import family
from tests.helpers.configs import changed
from tests.helpers.families.ltx_video import ltx_video
from tests.helpers.families.qwen_image import qwen_image
from tests.helpers.families.z_image import z_image
from tests.helpers.tiny import transformer
from training.config.schema import ConfigError, load_config
from training.distributed.context_parallel import divide_samples
from training.loop.dry_run import describe

ROOT = Path(__file__).parents[3]
QWEN, WAN = (ROOT / "training" / "configs" / f"{name}_phased.yaml" for name in ("qwen_image", "wan2_1_t2v_14b"))


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def refused(words: str, path: Path, *overrides: str, gpus: int) -> None:
    with pytest.raises(ConfigError) as error:
        describe(load_config(path, overrides), gpus=gpus)
    assert str(error.value) == words


def test_sizes_and_heads_that_cannot_be_divided_are_one_line() -> None:
    refused(
        "parallel.context_parallel: 2 processes cannot divide the 6889 tokens of 1328x1328; they can with a width of "
        "1344",
        *(QWEN, "parallel.context_parallel=2"),
        gpus=8,
    )
    refused(
        "parallel.context_parallel: 5 processes cannot divide the 24 attention heads of QwenImageTransformer2DModel",
        *(QWEN, "parallel.context_parallel=5"),
        gpus=5,
    )
    refused(
        "parallel.context_parallel: 4 processes cannot divide the 3402 tokens of 432x336, 21 frames; they can with "
        "a width of 448",
        *(WAN, "parallel.context_parallel=4", "data.buckets=[{width: 432, height: 336, frames: 21}]"),
        gpus=8,
    )


def test_a_kind_of_attention_that_would_see_half_of_the_tokens_is_one_line() -> None:
    with attention_backend("_native_math"):
        refused(
            "parallel.context_parallel: diffusers cannot divide attention with its backend _native_math: leave "
            "DIFFUSERS_ATTN_BACKEND unset",
            *(WAN, "parallel.context_parallel=2"),
            gpus=8,
        )


@pytest.mark.parametrize("build", [z_image, ltx_video])
def test_a_family_that_diffusers_cannot_divide_is_one_line(
    build: Callable[[], Any], settings_of_run: dict[str, Any], tmp_path: Path
) -> None:
    pipeline = build()
    pipeline.save_pretrained(tmp_path / "z")
    settings_of_run["model"] |= {"path": str(tmp_path / "z")}
    with pytest.raises(ConfigError) as error:
        describe(changed(settings_of_run, **{"parallel.context_parallel": 2}), gpus=2)
    network = type(pipeline.transformer).__name__
    assert str(error.value) == (
        f"parallel.context_parallel: diffusers cannot divide the tokens of {network}: leave it out"
    )


def test_compiled_blocks_of_a_shared_sample_compute_what_the_others_do() -> None:
    program = [sys.executable, str(ROOT / "tests" / "helpers" / "compiled_samples.py")]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["graphs"] > 0 and max(found["distances"]) < 1e-5


def test_a_dry_run_divides_samples_among_groups_and_weights_as_before() -> None:
    alone, together = (
        describe(load_config(QWEN, ["model.width=1344", f"parallel.context_parallel={degree}"]), gpus=8).splitlines()
        for degree in (1, 2)
    )
    changed = [(a, b) for a, b in zip(alone, together, strict=True) if a != b]
    activations, peak, samples = changed
    assert samples == (
        "an update has 64 samples, 8 for each GPU, 1 at once",
        "an update has 64 samples, 16 for each group of 2 GPUs, which share its tokens, 1 at once",
    )
    assert all(line.startswith("  activations ") for line in activations) and peak[0].startswith("  peak ")
    of_one, of_two = (float(line.split()[1]) for line in activations)
    assert of_two == pytest.approx(of_one / 2, rel=0.05), "of half the tokens"


@pytest.fixture
def last_of_four() -> Iterator[None]:
    """The last of four processes, the others of which are not there."""
    dist.init_process_group("fake", rank=3, world_size=4, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_neighbours_share_a_sample(last_of_four: None) -> None:
    network = transformer()
    divide_samples([network], 2, torch.device("cpu"))
    found = network.blocks[1].attn1.processor._parallel_config.context_parallel_config
    for mesh in (found._flattened_mesh, found._ulysses_mesh):
        assert dist.get_process_group_ranks(mesh.get_group()) == [2, 3]


def test_half_precision_runs_backwards_where_norms_compute_in_float32(last_of_four: None) -> None:
    """As with Wan on a GPU. Nobody answers here: there are dtypes, no numbers."""
    network = qwen_image().transformer
    divide_samples([network], 2, torch.device("cpu"))
    kinds = set()
    attention = network.transformer_blocks[0].attn
    for name in ("to_v", "norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        attention.get_submodule(name).register_forward_hook(lambda module, inputs, output: kinds.add(output.dtype))
    conditioning = {"prompt_embeds": torch.zeros(1, 4, 16), "prompt_mask": torch.ones(1, 4)}
    with torch.autocast("cpu", torch.bfloat16):
        velocity = family("qwen_image").velocity(network, torch.ones(1, 4, 1, 4, 4), 0.5, conditioning)
    velocity.float().sum().backward()
    assert kinds == {torch.bfloat16}
    assert attention.to_q.weight.grad is not None


def test_a_given_image_that_makes_tokens_uneven_is_one_line(last_of_four: None) -> None:
    network = qwen_image().transformer
    divide_samples([network], 2, torch.device("cpu"))
    conditioning = {
        "prompt_embeds": torch.zeros(1, 4, 16),
        "prompt_mask": torch.ones(1, 4),
        "image_latents": torch.zeros(1, 4, 1, 2, 6),
    }
    with pytest.raises(ConfigError) as error:
        family("qwen_image").velocity(network, torch.zeros(1, 4, 1, 4, 4), 0.5, conditioning)
    assert str(error.value) == "parallel.context_parallel: 2 processes cannot divide the 7 tokens of sample and image"
