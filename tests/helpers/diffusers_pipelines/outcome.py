"""What phased experts sample in a tiny pipeline of any class of diffusers, against a loop by hand.

``python -m tests.helpers.diffusers_pipelines.outcome`` writes the table of docs/pipelines.md.
"""

from __future__ import annotations

import functools
import inspect
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pdmd_core.experts import ExpertsError
from pdmd_core.pipelines import attach_experts
from pdmd_core.pipelines.refusals import reason_against
from tests.helpers.diffusers_pipelines.build import build, call_of, classes
from tests.helpers.diffusers_pipelines.by_hand import ByHand, with_adapters, with_weights
from tests.helpers.tiny_pipelines import KINDS, PLAN

PAGE = Path(__file__).parents[3] / "docs" / "pipelines.md"
EQUAL = "equal"
ELSEWHERE = {"QwenImageEditPipeline", "QwenImageEditPlusPipeline"}
"""Classes that tests/pdmd_core/pipelines/test_equality.py tries, in a size that is not built here."""
NO_GUIDANCE: dict[str, dict[str, float | None]] = {
    "guidance_scale": {"ZImage": 0.0, "Krea2": 0.0, "": 1.0},
    "true_cfg_scale": {"": 1.0},
    "audio_guidance_scale": {"": 1.0},
    "stg_scale": {"": 0.0},
    "audio_stg_scale": {"": 0.0},
    "modality_scale": {"": 1.0},
    "audio_modality_scale": {"": 1.0},
    "guidance_rescale": {"": 0.0},
    "guidance_schedule": {"": None},
    "audio_guidance_rescale": {"": 0.0},
}
"""Argument of calls to the value for no guidance, by how the name of the class begins."""
EMBEDDED = re.compile(r"Flux2?(Control|Fill|Kontext|Img|Inp)?|HunyuanVideo|HunyuanSky|VisualCloze|QwenImage")
"""Pipelines whose guidance_scale is an input of the network, which stays as the base has it."""


def unguided(name: str) -> dict[str, float | None]:
    """Arguments of a call for no guidance, as a reader of the pipeline would give them."""
    known = inspect.signature(getattr(diffusers, name).__call__).parameters
    embedded = EMBEDDED.match(name) and not name.startswith("Flux2Klein")
    found = {}
    for argument, values in NO_GUIDANCE.items():
        if argument in known and not (argument == "guidance_scale" and embedded):
            found[argument] = next(value for start, value in values.items() if name.startswith(start))
    return found


def outcome(name: str, kind: str) -> str:
    """``equal``, the sentence by which experts of a kind ("lora", "full") are refused, or by which the class fails."""
    pipe = build(name)
    if (reason := reason_against(pipe)) is not None:
        return f"refused: {reason}"
    with tempfile.TemporaryDirectory() as folder:
        KINDS[kind](Path(folder), pipe, PLAN)
        try:
            attach_experts(pipe, folder)
        except ExpertsError as error:
            return f"refused: {error}"
        try:
            sampled, forwards = _called(pipe, call_of(name), pipe.phased.networks or [pipe.transformer])
        except Exception as error:
            with pytest.raises(type(error), match=re.escape(str(error))):
                _by_hand(name, kind, Path(folder))
            return f"fails without experts too: {error}"
        expected, by_hand = _by_hand(name, kind, Path(folder))
    assert forwards == by_hand and len(forwards) <= len(PLAN.sigmas), "one forward a step, of one sample"
    assert sampled and all(tensor.isfinite().all() for tensor in sampled)
    for found, right in zip(sampled, expected, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-5, msg="not what a loop by hand samples")
    return EQUAL


def _by_hand(name: str, kind: str, folder: Path) -> tuple[list[Tensor], list[int]]:
    pipe = build(name)
    files = [f"{phase.name}.safetensors" for phase in PLAN.phases]
    if kind == "full":
        take = with_weights(pipe.transformer, [load_file(folder / file) for file in files])
    else:
        take = with_adapters(pipe, folder, files)
    pipe.register_modules(scheduler=ByHand().walk(PLAN, take))
    for guider in [part for part in pipe.config if part == "guider" or part.endswith("_guider")]:
        pipe.register_modules(**{guider: diffusers.ClassifierFreeGuidance(guidance_scale=1.0)})
    if hasattr(pipe, "get_timesteps"):
        _say_where_it_starts(pipe)
    call = call_of(name) | unguided(name)
    known = inspect.signature(type(pipe).__call__).parameters
    if "num_inference_steps" in known:
        call["num_inference_steps"] = len(PLAN.sigmas)
    if "use_kv_cache" in known:
        call["use_kv_cache"] = False  # what an expert computed is its own
    return _called(pipe, call, [pipe.transformer])


def _say_where_it_starts(pipe: Any) -> None:
    """WanVideoToVideoPipeline slices the timesteps without set_begin_index."""
    stock = pipe.get_timesteps

    def get_timesteps(*args: Any, **kwargs: Any) -> Any:
        found = stock(*args, **kwargs)
        if pipe.scheduler.begin_index is None:
            pipe.scheduler.set_begin_index(len(PLAN.sigmas) - len(found[0]))
        return found

    pipe.get_timesteps = get_timesteps


def _called(pipe: Any, call: dict[str, Any], networks: Any) -> tuple[list[Tensor], list[int]]:
    """What a call returns, and the size of the batch of each forward."""
    seen: list[int] = []

    def see(network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next(iter(_tensors([*args, *kwargs.values()])), None)
        seen.append(0 if first is None or first.ndim == 0 else len(first))

    for network in networks:
        network.register_forward_pre_hook(see, with_kwargs=True)
    torch.manual_seed(3)  # some pipelines encode pictures without their generator
    return list(_tensors(pipe(**call)[0])), seen


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)


def of_this_version() -> bool:
    """Whether the page is of the version of diffusers that is installed."""
    found = re.search(r"diffusers (\d+\.\d+)", PAGE.read_text(encoding="utf-8"))
    return found is not None and diffusers.__version__.startswith(f"{found[1]}.")


@functools.cache
def rows() -> dict[str, dict[str, str]]:
    """The table of the page: class to LoRA and full."""
    found = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: {"lora": lora, "full": full} for name, lora, full in found}


def counts(table: dict[str, dict[str, str]]) -> str:
    """The table in one sentence."""
    full, lora = (sum(cells[kind] == EQUAL for cells in table.values()) for kind in ("full", "lora"))
    neither = sum(all(cell.startswith("refused") for cell in cells.values()) for cells in table.values())
    fails = sum(cells["full"].startswith("fails") for cells in table.values())
    return (
        f"Of {len(table)} classes {full} are equal with full experts, {lora} with LoRA experts, {neither} are refused "
        f"with either, {fails} fail without experts too."
    )


def main() -> None:
    """Write the table."""
    table = {}
    for name in classes():
        known = name in ELSEWHERE
        table[name] = {kind: EQUAL if known else outcome(name, kind) for kind in ("lora", "full")}
        print(name, table[name], flush=True)
    head, version = PAGE.read_text(encoding="utf-8").partition("| pipeline |")[0], diffusers.__version__
    head = re.sub(r"diffusers \d+\.\d+", f"diffusers {version.rpartition('.')[0]}", head)
    head = re.sub(r"Of \d+ classes .*?\.", counts(table), head, flags=re.DOTALL)
    lines = [head + "| pipeline | LoRA | full |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | {cells['lora']} | {cells['full']} |" for name, cells in table.items()]
    PAGE.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
