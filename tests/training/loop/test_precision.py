"""bfloat16 under autocast: what is cast, and what is kept of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState
from peft.tuners.tuners_utils import BaseTunerLayer

from benchmarks.cost.random_training import RandomTraining, small_config, small_teacher
from training.loop.precision import make_accelerator


@pytest.fixture(autouse=True)
def of_any_precision() -> Iterator[None]:
    AcceleratorState._reset_state()  # it keeps the precision of the first run in a process
    yield
    AcceleratorState._reset_state()


def training(*, casts: bool) -> RandomTraining:
    torch.manual_seed(0)
    config = small_config(precision="bf16", fake_updates=1, plan={"steps": [2], "shift": 5.0})
    found = RandomTraining(config, small_teacher("qwen_image", "tiny", 4), make_accelerator("bf16", "cpu"))
    if casts:
        for network in found.roles.networks():
            for module in network.modules():
                if isinstance(module, BaseTunerLayer):
                    module.cast_input_dtype_enabled = True
    return found


def test_adapters_take_their_inputs_as_they_come_and_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    casts = []
    original = BaseTunerLayer._cast_input_dtype

    def counted(self: BaseTunerLayer, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        found = original(self, x, dtype)
        casts.append(found.dtype != x.dtype)
        return found

    monkeypatch.setattr(BaseTunerLayer, "_cast_input_dtype", counted)
    wanted = training(casts=True).update().values
    assert any(casts)
    casts.clear()
    assert training(casts=False).update().values == wanted
    assert casts and not any(casts)


def test_no_cast_of_a_weight_is_kept_for_a_later_step() -> None:
    found, kept = training(casts=False), []
    found.roles.networks()[0].register_forward_hook(lambda *_: kept.append(torch.is_autocast_cache_enabled()))
    found.update()
    assert kept and not any(kept)


def test_prompts_are_padded_within_what_is_evaluated_at_once() -> None:
    torch.manual_seed(0)
    memory = {"micro_batch_size": 1, "guidance_batched": False}
    config = small_config(fake_updates=1, batch_size=2, plan={"steps": [1], "shift": 5.0}, memory=memory)
    found = RandomTraining(config, small_teacher("qwen_image", "tiny", 4), make_accelerator("no", "cpu"))
    lengths, rows = (5, 9), found.batches.prompts.rows
    for row, length in enumerate(lengths):  # the negative prompt is given the mask of the example
        rows["prompt_mask"][row, length:] = 0
        rows["prompt_embeds"][row, length:] = 0
    seen = []

    def shape(network: torch.nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        seen.append((kwargs["encoder_hidden_states"].shape[1], kwargs["encoder_hidden_states_mask"]))

    found.roles.networks()[0].register_forward_pre_hook(shape, with_kwargs=True)
    found.update()
    assert {width for width, _ in seen} == {5, 9}
    assert all(mask is None for _, mask in seen)
