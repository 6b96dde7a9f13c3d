"""Well-known few-step files and models that others released: their steps, shift, guidance, and where that is said.

(Standard library only.)
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """What a released few-step file or model was distilled for."""

    name: str
    """What ``PhasePlan.preset`` takes."""
    title: str
    """What it is."""
    base: str
    """Hub id of the pipeline that it belongs to, or of the distilled model itself."""
    steps: tuple[int, ...]
    """Steps of each phase; one phase for one network."""
    shift: float | None
    """The shift of uniform steps; None where the sigmas are given."""
    source: str
    """Where steps and shift are said."""
    files: tuple[str, ...] = ()
    """LoRA files on the Hub, one for each phase, as ``PhasedExperts.from_lora_files`` takes them; none for a model that
    is distilled as a whole, and for files whose names are not known here."""
    sigmas: tuple[tuple[float, ...], ...] = ()
    """The sigmas of each phase, where no shift makes them."""
    guidance: float = 1.0
    """The guidance scale; 1 is none."""
    template: str | None = None
    """ComfyUI's own workflow template with it."""
    template_shift: float | None = None
    """The shift there, where it is another."""


_COMFY_WAN = "Comfy-Org/Wan_2.2_ComfyUI_Repackaged/split_files/loras/"
_QWEN = "lightx2v/Qwen-Image-Lightning/"
_LIGHTX2V = "https://github.com/ModelTC/LightX2V (configs/distill, configs/wan22)"
_LIGHTNING = "https://github.com/ModelTC/Qwen-Image-Lightning (base_shift = max_shift = log 3)"
_KIJAI = "Kijai/WanVideo_comfy/Lightx2v/"


def _flux2_shift(width: int, height: int, steps: int) -> float:
    """FLUX.2's own shift, which depends on size and steps (``compute_empirical_mu`` of its pipeline in diffusers)."""
    tokens = width * height / 16**2
    at_200, at_10 = 0.00016927 * tokens + 0.45666666, 8.73809524e-05 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190
    return math.exp(slope * steps + at_200 - 200 * slope)


_ALL = (
    Preset(
        "wan2.2-lightx2v-4step",
        "Wan 2.2 A14B text to video, lightx2v LoRA pair",
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        (2, 2),
        5.0,
        _LIGHTX2V,
        tuple(f"{_COMFY_WAN}wan2.2_t2v_lightx2v_4steps_lora_v1.1_{end}_noise.safetensors" for end in ("high", "low")),
        template="video_wan2_2_14B_t2v",
    ),
    Preset(
        "wan2.2-i2v-lightx2v-4step",
        "Wan 2.2 A14B image to video, lightx2v LoRA pair",
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        (2, 2),
        5.0,
        _LIGHTX2V,
        tuple(f"{_COMFY_WAN}wan2.2_i2v_lightx2v_4steps_lora_v1_{end}_noise.safetensors" for end in ("high", "low")),
        template="video_wan2_2_14B_i2v",
    ),
    Preset(
        "wan2.2-i2v-distill-4step",
        "Wan 2.2 A14B image to video, lightx2v distilled LoRA pair of October 2025 (1022)",
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        (2, 2),
        5.0,
        _LIGHTX2V,
        tuple(
            f"lightx2v/Wan2.2-Distill-Loras/wan2.2_i2v_A14b_{end}_noise_lora_rank64_lightx2v_4step_1022.safetensors"
            for end in ("high", "low")
        ),
    ),
    Preset(
        "wan2.1-lightx2v-4step",
        "Wan 2.1 14B text to video, lightx2v step and guidance distilled LoRA",
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        (4,),
        5.0,
        _LIGHTX2V,
        (f"{_KIJAI}lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16.safetensors",),
    ),
    Preset(
        "wan2.1-i2v-lightx2v-4step",
        "Wan 2.1 14B image to video 480p, lightx2v step and guidance distilled LoRA",
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
        (4,),
        5.0,
        _LIGHTX2V,
        (f"{_KIJAI}lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16.safetensors",),
    ),
    Preset(
        "qwen-image-lightning-4step",
        "Qwen-Image, Lightning LoRA",
        "Qwen/Qwen-Image",
        (4,),
        3.0,
        _LIGHTNING,
        (f"{_QWEN}Qwen-Image-Lightning-4steps-V1.0.safetensors",),
    ),
    Preset(
        "qwen-image-lightning-8step",
        "Qwen-Image, Lightning LoRA",
        "Qwen/Qwen-Image",
        (8,),
        3.0,
        _LIGHTNING,
        (f"{_QWEN}Qwen-Image-Lightning-8steps-V1.0.safetensors",),
        template="image_qwen_image",
        template_shift=3.1,
    ),
    Preset(
        "qwen-image-2512-lightning-4step",
        "Qwen-Image 2512, Lightning LoRA",
        "Qwen/Qwen-Image-2512",
        (4,),
        3.0,
        _LIGHTNING,
        ("lightx2v/Qwen-Image-2512-Lightning/Qwen-Image-2512-Lightning-4steps-V1.0-fp32.safetensors",),
        template="image_qwen_Image_2512",
        template_shift=3.1,
    ),
    Preset(
        "qwen-image-2512-lightning-8step",
        "Qwen-Image 2512, Lightning LoRA",
        "Qwen/Qwen-Image-2512",
        (8,),
        3.0,
        _LIGHTNING,
    ),
    Preset(
        "qwen-image-edit-lightning-4step",
        "Qwen-Image-Edit, Lightning LoRA",
        "Qwen/Qwen-Image-Edit",
        (4,),
        3.0,
        _LIGHTNING,
        (f"{_QWEN}Qwen-Image-Edit-Lightning-4steps-V1.0-bf16.safetensors",),
        template="image_qwen_image_edit",
    ),
    Preset(
        "qwen-image-edit-lightning-8step",
        "Qwen-Image-Edit, Lightning LoRA",
        "Qwen/Qwen-Image-Edit",
        (8,),
        3.0,
        _LIGHTNING,
        (f"{_QWEN}Qwen-Image-Edit-Lightning-8steps-V1.0-bf16.safetensors",),
    ),
    Preset(
        "qwen-image-edit-2509-lightning-4step",
        "Qwen-Image-Edit 2509, Lightning LoRA",
        "Qwen/Qwen-Image-Edit-2509",
        (4,),
        3.0,
        _LIGHTNING,
        (f"{_QWEN}Qwen-Image-Edit-2509/Qwen-Image-Edit-2509-Lightning-4steps-V1.0-bf16.safetensors",),
        template="image_qwen_image_edit_2509",
    ),
    Preset(
        "qwen-image-edit-2509-lightning-8step",
        "Qwen-Image-Edit 2509, Lightning LoRA",
        "Qwen/Qwen-Image-Edit-2509",
        (8,),
        3.0,
        _LIGHTNING,
        (f"{_QWEN}Qwen-Image-Edit-2509/Qwen-Image-Edit-2509-Lightning-8steps-V1.0-bf16.safetensors",),
    ),
    Preset(
        "qwen-image-edit-2511-lightning-4step",
        "Qwen-Image-Edit 2511, Lightning LoRA",
        "Qwen/Qwen-Image-Edit-2511",
        (4,),
        3.0,
        _LIGHTNING,
        ("lightx2v/Qwen-Image-Edit-2511-Lightning/Qwen-Image-Edit-2511-Lightning-4steps-V1.0-bf16.safetensors",),
        template="image_qwen_image_edit_2511",
        template_shift=3.1,
    ),
    Preset(
        "qwen-image-edit-2511-lightning-8step",
        "Qwen-Image-Edit 2511, Lightning LoRA",
        "Qwen/Qwen-Image-Edit-2511",
        (8,),
        3.0,
        _LIGHTNING,
    ),
    Preset(
        "z-image-turbo",
        "Z-Image-Turbo, a distilled model",
        "Tongyi-MAI/Z-Image-Turbo",
        (8,),
        3.0,
        "https://huggingface.co/Tongyi-MAI/Z-Image-Turbo (8 evaluations, shift 3)",
        template="image_z_image_turbo",
    ),
    Preset(
        "flux2-klein-4b",
        "FLUX.2 klein 4B, a distilled model, at 1024x1024",
        "black-forest-labs/FLUX.2-klein-4B",
        (4,),
        _flux2_shift(1024, 1024, 4),
        "Flux2KleinPipeline of diffusers, compute_empirical_mu",
        template="image_flux2_klein_text_to_image",
    ),
    Preset(
        "flux2-klein-9b",
        "FLUX.2 klein 9B, a distilled model, at 1024x1024",
        "black-forest-labs/FLUX.2-klein-9B",
        (4,),
        _flux2_shift(1024, 1024, 4),
        "Flux2KleinPipeline of diffusers, compute_empirical_mu",
        template="image_flux2_klein_image_edit_9b_distilled",
    ),
    Preset(
        "ltx2-distilled",
        "LTX-2 19B distilled, first stage",
        "Lightricks/LTX-2",
        (8,),
        None,
        "DISTILLED_SIGMA_VALUES of diffusers (pipelines/ltx2/utils.py)",
        sigmas=((1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875),),
        template="video_ltx2_t2v_distilled",
    ),
    Preset(
        "hunyuanvideo1.5-i2v-8step",
        "HunyuanVideo 1.5 image to video 480p, step-distilled model",
        "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v_step_distilled",
        (8,),
        7.0,
        "https://huggingface.co/tencent/HunyuanVideo-1.5 (8 or 12 steps); diffusers' conversion script (shift 7)",
    ),
    Preset(
        "hunyuanvideo1.5-i2v-12step",
        "HunyuanVideo 1.5 image to video 480p, step-distilled model",
        "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v_step_distilled",
        (12,),
        7.0,
        "https://huggingface.co/tencent/HunyuanVideo-1.5 (8 or 12 steps); diffusers' conversion script (shift 7)",
    ),
)

PRESETS = {preset.name: preset for preset in _ALL}
"""Name to preset, in the order of ``phased-dmd plan --list``."""


def find_preset(name: str) -> Preset:
    """Look up a preset.

    Args:
        name: Its name.

    Returns:
        The preset.

    Raises:
        ValueError: If there is none of this name; the line names near ones.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(str(name), list(PRESETS), n=3, cutoff=0.4)
        guess = f", did you mean {' or '.join(near)}?" if near else "."
        raise ValueError(f"no preset {str(name)[:60]!r}{guess} All are listed by phased-dmd plan --list")
    return PRESETS[name]


def list_presets() -> str:
    """Write all presets as a text table.

    Returns:
        One line for each after a header.
    """
    rows = [("name", "steps", "shift", "guidance", "base")]
    for preset in _ALL:
        shift = "sigmas" if preset.shift is None else f"{preset.shift:.4g}"
        rows.append((preset.name, "+".join(map(str, preset.steps)), shift, f"{preset.guidance:g}", preset.base))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
