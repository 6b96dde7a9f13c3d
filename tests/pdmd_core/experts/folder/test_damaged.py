"""Damaged and foreign weights in an experts folder are refused in one line."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pdmd_core.experts import PhasedExperts, lora_to_file
from tests.helpers.experts_folder import ALPHA, MODULE, PLAN, RANK, WAN, accept, refused, rewrite
from tests.helpers.tiny import lora_roles


def test_more_than_the_memory_holds_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    experts = PhasedExperts.open(folder)
    monkeypatch.setattr("pdmd_core.experts.format.mapped.safe_open", no_memory)
    with refused("low_noise.safetensors", "cannot be read ('[Errno 12] Cannot allocate memory')"):
        experts.tensors("low_noise")


def cut(content: bytes) -> bytes:
    return content[:-1]


def flip(content: bytes) -> bytes:
    return content[:-7] + bytes([content[-7] ^ 1]) + content[-6:]


def empty(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [cut, flip, empty])
def test_a_damaged_file_is_refused_by_its_hash(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    path = folder / "low_noise.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    experts = PhasedExperts.open(folder)
    with refused(str(path), "sha256 is", experts.manifest.experts[1].sha256[:12], "download it again"):
        experts.lora_state("low_noise")
    assert experts.lora_state("high_noise"), "the other expert is whole"


def test_swapped_files_are_refused_by_their_hashes(folder: Path) -> None:
    high, low = folder / "high_noise.safetensors", folder / "low_noise.safetensors"
    high.rename(folder / "x")
    low.rename(high)
    (folder / "x").rename(low)
    for name in ("high_noise", "low_noise"):
        with refused("sha256"):
            PhasedExperts.open(folder).tensors(name)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04\x95pickle",
        (2**60).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (20).to_bytes(8, "little") + b'{"x":{"dtype":"F32"}',
        (56).to_bytes(8, "little") + b'{"x":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}  ' + bytes(4),
        (56).to_bytes(8, "little") + b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}  ' + bytes(4),
        (56).to_bytes(8, "little") + b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}  ' + bytes(2),
    ],
    ids=["empty", "pickle", "huge-header", "list-header", "open-header", "unknown-dtype", "wrong-size", "short"],
)
def test_a_file_that_is_no_safetensors_is_refused_even_with_the_right_hash(folder: Path, content: bytes) -> None:
    (folder / "low_noise.safetensors").write_bytes(content)
    accept(folder, "low_noise")
    with refused("low_noise.safetensors", "not a readable safetensors file"):
        PhasedExperts.open(folder).tensors("low_noise")


def test_a_file_of_another_rank_than_the_manifest_s_is_refused(folder: Path) -> None:
    accept(folder, "low_noise", rank=RANK + 1)
    with refused("low_noise.safetensors", f"expected rank {RANK + 1}", "lora_"):
        PhasedExperts.open(folder).lora_state("low_noise")


@pytest.mark.parametrize("alpha", [ALPHA + 0.5, float(RANK), 1.0])
def test_a_file_of_another_alpha_than_the_manifest_s_is_refused(folder: Path, alpha: float) -> None:
    accept(folder, "low_noise", alpha=alpha)
    with refused("low_noise.safetensors", f"is not the manifest's alpha {alpha}"):
        PhasedExperts.open(folder).lora_state("low_noise")


@pytest.mark.parametrize(
    "alpha", [float("nan"), float("inf"), 0.0, -ALPHA, [ALPHA, ALPHA]], ids=["nan", "inf", "zero", "negative", "two"]
)
def test_one_odd_alpha_among_the_modules_is_refused(folder: Path, alpha: float | list[float]) -> None:
    experts = rewrite(folder, "low_noise", lambda t: t.update({f"{MODULE}.alpha": torch.tensor(alpha)}))
    with refused(f"{MODULE}.alpha", "is not the manifest's alpha"):
        experts.lora_state("low_noise")


@pytest.mark.parametrize(
    ("shape", "part"),
    [
        ((RANK + 1, 24), "lora_down"),
        ((24, RANK + 1), "lora_up"),
        ((RANK,), "lora_down"),
        ((), "lora_down"),
        ((RANK, 24, 1, 1), "lora_down"),
    ],
)
def test_a_weight_of_a_shape_that_is_no_lora_s_is_refused(folder: Path, shape: tuple[int, ...], part: str) -> None:
    key = f"{MODULE}.{part}.weight"
    experts = rewrite(folder, "low_noise", lambda t: t.update({key: torch.zeros(shape)}))
    with refused(key, str(shape), f"expected rank {RANK}"):
        experts.lora_state("low_noise")


def test_weights_of_another_width_do_not_fit_the_network_and_are_named(folder: Path) -> None:
    key = f"{MODULE}.lora_down.weight"
    experts = rewrite(folder, "low_noise", lambda t: t.update({key: torch.zeros(RANK, 25)}))
    state = experts.lora_state("low_noise")
    target = lora_roles(PLAN, RANK, ALPHA)
    with pytest.raises(ValueError, match=re.escape("blocks.1.attn2.to_k.lora_A of shape (4, 24), found (4, 25)")):
        target.load_state_dict("low_noise", state)


@pytest.mark.parametrize("part", ["lora_down.weight", "lora_up.weight", "alpha"])
def test_a_module_without_one_of_its_three_parts_is_refused(folder: Path, part: str) -> None:
    experts = rewrite(folder, "low_noise", lambda t: t.pop(f"{MODULE}.{part}"))
    with refused("low_noise.safetensors", "every adapted module needs lora_down, lora_up and alpha"):
        experts.lora_state("low_noise")


@pytest.mark.parametrize("part", ["lora_down.weight", "lora_up.weight", "alpha"])
def test_what_would_be_scaled_wrongly_is_refused_without_a_family_too(folder: Path, part: str) -> None:
    """ComfyUI and diffusers take the tensors as they are: without alpha they would be scaled by 1."""
    with refused("every adapted module needs lora_down, lora_up and alpha, 19 of 20 modules have them"):
        rewrite(folder, "low_noise", lambda t: t.pop(f"{MODULE}.{part}")).tensors("low_noise")
    accept(folder, "high_noise", alpha=ALPHA / 2)
    with refused("high_noise.safetensors", f"is not the manifest's alpha {ALPHA / 2}"):
        PhasedExperts.open(folder).tensors("high_noise")
    accept(folder, "high_noise", alpha=ALPHA, rank=RANK + 1)
    with refused("high_noise.safetensors", f"expected rank {RANK + 1}"):
        PhasedExperts.open(folder).tensors("high_noise")


def test_a_file_that_adapts_other_modules_than_the_manifest_s_targets_is_refused(folder: Path) -> None:
    accept(folder, "low_noise", targets=WAN.lora_targets[1:])
    with refused("low_noise.safetensors", f"adapts blocks.0.{WAN.lora_targets[0]}", "none of the manifest's targets"):
        PhasedExperts.open(folder).lora_state("low_noise")
    accept(folder, "low_noise", targets=(*WAN.lora_targets, "attn1.norm_q"))
    with refused("low_noise.safetensors", "adapts nothing for the manifest's target 'attn1.norm_q'", "is missing"):
        PhasedExperts.open(folder).lora_state("low_noise")
    accept(folder, "low_noise", targets=("_q", *WAN.lora_targets))
    with refused("adapts nothing for the manifest's target '_q'"):
        PhasedExperts.open(folder).lora_state("low_noise")


def test_a_file_without_any_weights_is_refused(folder: Path) -> None:
    experts = rewrite(folder, "low_noise", lambda t: t.clear())
    with refused("every adapted module needs"):
        experts.lora_state("low_noise")


@pytest.mark.parametrize(
    "key",
    [
        "transformer.blocks.0.attn1.to_q.lora_A.weight",
        "blocks.0.self_attn.q.lora_down.weight",
        "lora_unet_blocks_0_self_attn_q.lora_down.weight",
        f"{MODULE}.lora_A.weight",
        f"{MODULE}.diff",
        f"{MODULE}.alpha.weight",
    ],
)
def test_a_key_of_another_format_is_named(folder: Path, key: str) -> None:
    experts = rewrite(folder, "low_noise", lambda t: t.update({key: torch.zeros(RANK, 24)}))
    with refused(
        "low_noise.safetensors", repr(key), "diffusion_model.<module>.lora_down.weight|.lora_up.weight|.alpha"
    ):
        experts.lora_state("low_noise")


def test_a_module_that_wan_does_not_have_is_named(folder: Path) -> None:
    gate = lora_to_file({"blocks.0.attn1.to_q.lora_A": torch.zeros(RANK, 24)}, ALPHA, WAN)
    gate |= lora_to_file({"blocks.0.attn1.to_q.lora_B": torch.zeros(24, RANK)}, ALPHA, WAN)
    gate = {key.replace("self_attn.q", "self_attn.gate"): value for key, value in gate.items()}
    experts = rewrite(folder, "low_noise", lambda t: t.update(gate))
    with refused("low_noise.safetensors", "'blocks.0.self_attn.gate'"):
        experts.lora_state("low_noise")
