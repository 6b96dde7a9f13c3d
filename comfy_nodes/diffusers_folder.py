"""A pipeline in diffusers' layout (a folder with model_index.json) as MODEL, CLIP and VAE.

ComfyUI itself loads networks under their original names and sizes only; this reads stock diffusers folders of any size,
such as the embedded teacher of this repository, where the model family names its pipeline for that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.text_encoders.t5
import folder_paths
import torch

from ..pdmd_core.experts.format.untrusted import read_json, shown
from ..pdmd_core.experts.format.weights import open_weights
from ..pdmd_core.families import FAMILIES, ModelFamily, family
from .errors import NodeError

FOLDER = "diffusers"
"""The kind of ComfyUI's model folders in which pipelines lie."""
_REPOSITORY = Path(__file__).resolve().parents[1]
_ACTIVATIONS = {"gelu_new": "gelu_pytorch_tanh"}
"""Activations of transformers, under the names that ComfyUI has for them."""


def register_folder() -> None:
    """Add the teacher that a clone of this repository ships to ComfyUI's own ``models/diffusers``."""
    if (_REPOSITORY / "training/embedded/models").is_dir():
        folder_paths.add_model_folder_path(FOLDER, str(_REPOSITORY / "training/embedded/models"))


def folder_names() -> list[str]:
    """List the folders with a model_index.json of a pipeline."""
    return sorted(_folders())


def _folders() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for root in map(Path, folder_paths.get_folder_paths(FOLDER)):
        for index in sorted(root.glob("*/model_index.json")):
            found.setdefault(index.parent.name, index.parent)
    return found


def load(name: str, tokens: int) -> tuple[Any, Any, Any]:
    """Load MODEL, CLIP and VAE of a pipeline folder.

    Args:
        name: The folder's name, as ``folder_names`` lists it.
        tokens: The number of tokens to which prompts are padded.

    Returns:
        MODEL, CLIP and VAE.

    Raises:
        NodeError: If the folder is not that of a WanPipeline with one network, or if ComfyUI cannot load a part of it.
        ExpertsError: If a file in it is not readable.
    """
    folder = _folders().get(name)
    if folder is None:
        raise NodeError(f"no pipeline folder {name!r} with a model_index.json in models/diffusers")
    index = _json(folder / "model_index.json")
    known = {pipeline: found for found in map(family, FAMILIES) for pipeline in found.comfyui_pipelines}
    kind = str(index.get("_class_name"))
    if kind not in known:
        raise NodeError(f"{name}: a {' or '.join(known)} is expected, found a {kind}")
    if (index.get("transformer_2") or [None])[0]:
        raise NodeError(f"{name}: this pipeline has two networks: convert each with python -m pdmd_core.experts")
    model = _model(folder / "transformer", known[kind])
    return model, _clip(folder, tokens), _vae(folder / "vae", known[kind], model.get_model_object("latent_format"))


def _model(folder: Path, names: ModelFamily) -> Any:
    config = _json(folder / "config.json")
    try:
        state = {names.native_weight_name(key): value for key, value in _weights(folder).items()}
    except ValueError as error:
        raise NodeError(f"{folder}: {error}") from None
    small = names.comfyui_config(config)
    metadata = {"config": json.dumps({"transformer": small})} if small else None
    model = comfy.sd.load_diffusion_model_state_dict(state, metadata=metadata)
    if model is None:
        raise NodeError(f"{folder}: ComfyUI does not know this network")
    return model


def _vae(folder: Path, names: ModelFamily, latent_format: Any) -> Any:
    config = _json(folder / "config.json")
    try:
        state = names.native_autoencoder(config, _weights(folder))
    except ValueError as error:
        raise NodeError(f"{folder}: {error}") from None
    for key in ("latents_mean", "latents_std"):
        expected = getattr(latent_format, key).flatten()
        if not torch.allclose(torch.tensor(config[key]), expected.float(), atol=1e-4):
            raise NodeError(f"{folder}: {key} is not that of {names.title}, which ComfyUI takes for granted")
    vae = comfy.sd.VAE(sd=state)
    vae.throw_exception_if_invalid()
    return vae


def _clip(folder: Path, tokens: int) -> Any:
    config, state = _json(folder / "text_encoder/config.json"), _weights(folder / "text_encoder")
    if config.get("model_type") != "umt5":
        raise NodeError(f"{folder}: the text encoder is a umt5, found {config.get('model_type')!r}")
    config["dense_act_fn"] = _ACTIVATIONS.get(config["dense_act_fn"], config["dense_act_fn"])
    special = {"end": config["eos_token_id"], "pad": config["pad_token_id"]}

    class Tokens:
        """The folder's own tokenizer where ComfyUI makes one from a path."""

        @staticmethod
        def from_pretrained(path: str) -> Any:
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast(tokenizer_file=path)

    class Tokenizer(comfy.sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
            super().__init__(
                str(folder / "tokenizer/tokenizer.json"),
                pad_with_end=False,
                embedding_size=config["d_model"],
                embedding_key="umt5",
                tokenizer_class=Tokens,
                has_start_token=False,
                pad_to_max_length=False,
                max_length=tokens,
                min_length=tokens,
                pad_token=special["pad"],
            )

    class Encoder(comfy.sd1_clip.SDClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
            super().__init__(
                device=device,
                layer="last",
                textmodel_json_config=config,
                dtype=dtype,
                special_tokens=special,
                model_class=comfy.text_encoders.t5.T5,
                enable_attention_masks=True,
                zero_out_masked=True,
                model_options=model_options or {},
            )

    class OneTokenizer(comfy.sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
            super().__init__(embedding_directory, {}, clip_name="umt5", tokenizer=Tokenizer)

    class OneEncoder(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
            super().__init__(
                device=device, dtype=dtype, model_options=model_options or {}, name="umt5", clip_model=Encoder
            )

    target = comfy.supported_models_base.ClipTarget(OneTokenizer, OneEncoder)
    stored = next(value.dtype for value in state.values() if value.is_floating_point())
    clip = comfy.sd.CLIP(target, model_options={"dtype": stored})
    missing, _ = clip.load_sd(state)
    missing = [key for key in missing if key != "logit_scale"]
    if missing:
        raise NodeError(f"{folder}: the text encoder lacks {len(missing)} weights, for example {missing[0]!r}")
    return clip


def _weights(folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise NodeError(f"{folder}: no .safetensors file here; other formats are not read")
    weights = open_weights(*files)
    return {key: weights.read(key) for key in weights.specs}


def _json(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict):
        raise NodeError(f"{path}: a JSON object is expected, found {shown(found)}")
    return found
