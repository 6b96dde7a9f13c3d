from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks.cost import full_size
from benchmarks.cost.full_size import REHEARSAL, check_overrides, measure, needed, page, recipe_of, table
from benchmarks.cost.random_training import released_teacher

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """And without the accelerator of other tests, whose precision is another one."""
    monkeypatch.chdir(ROOT)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_smallest_released_model_is_rehearsed() -> None:
    config = recipe_of("wan2_1_t2v_1_3b", [*REHEARSAL, "model.frames=5"])
    row = measure(config, 1, 1, 1, "cpu")
    assert row["phase"] == "low_noise" and row["latents"] == [16, 2, 8, 8]
    assert len(row["seconds"]) == 1 and row["seconds"][0] > 0
    assert row["peak"] > 0 and row["held"] > 2 * row["parameters"]


def test_a_model_that_does_not_fit_is_a_line_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate\n 60 GiB")

    monkeypatch.setattr(full_size, "released_teacher", full)
    row = measure(recipe_of("wan2_1_t2v_1_3b", []), 1, 0, 1, "cpu")
    assert row == {"phase": "high_noise", "failed": "out of memory: tried to allocate 60 GiB"}
    assert table([{"model": "m", **row}]).splitlines()[-1] == "| m | high_noise |  |  | out of memory |  |  |"


@pytest.mark.parametrize("key", ["parallel.sharding=fsdp", "updates=3", "model.path=x", "--steps", "lr_decay_share=0"])
def test_keys_that_change_nothing_are_refused(key: str) -> None:
    check_overrides(["memory.micro_batch_size=1", "attention=flash", "batch_size=2"])
    with pytest.raises(ValueError, match=f"^{key}: expected key=value of model, plan, .* change nothing"):
        check_overrides([key])


def test_samples_are_those_of_the_recipe() -> None:
    teacher = released_teacher(recipe_of("wan2_2_t2v_a14b", ["memory.offload_idle_network=false"]), 1, "meta")
    assert list(teacher.networks) == ["transformer", "transformer_2"]
    assert teacher.shape == (16, 21, 60, 104) and teacher.conditioning == {"prompt_embeds": (512, 4096)}
    assert released_teacher(recipe_of("qwen_image", []), 1, "meta").shape == (16, 1, 166, 166)
    images = released_teacher(recipe_of("wan2_2_i2v_a14b", ["memory.offload_idle_network=false"]), 1, "meta")
    assert images.conditioning == {"prompt_embeds": (512, 4096), "image_latents": (16, 21, 60, 104)}
    edits = released_teacher(recipe_of("qwen_image_edit", []), 1, "meta").conditioning
    assert (edits["image_latents"], edits["prompt_embeds"]) == ((16, 1, 128, 128), (1024 + 37 * 37, 3584))


def test_a_page_says_what_it_is() -> None:
    row = {"model": "m", "phase": "p", "parameters": 2e10, "latents": [16, 1], "seconds": [3.0, 1.0, 2.0]}
    row |= {"held": 2**30, "peak": 3 * 2**30}
    assert table([row]).splitlines()[-1] == "| m | p | 20 G | 16x1 | 2 (1 to 3) | 1.00 | 3.00 |"
    rehearsed, real = (page([row], {"m": "5 GiB"}, flag, "cpu", 3) for flag in (True, False))
    assert "no table of a GPU" in rehearsed and "no table of a GPU" not in real
    assert "3 updates after one to warm up" in real
    assert "| m | 5 GiB |" in rehearsed and "| m | 5 GiB |" in real


def test_what_a_model_needs_is_the_dry_run_s() -> None:
    assert needed(recipe_of("wan2_1_t2v_1_3b", [])).endswith("GiB")
    assert float(needed(recipe_of("wan2_1_t2v_1_3b", [])).split()[0]) > 2.64, "the teacher alone"
