"""Train the embedded teacher: ``python -m training.embedded.train_teacher --autoencoder A --output_dir D``.

The result is a stock ``WanPipeline`` folder. Latents of random emoji scenes are made once and kept in memory; then the
transformer and its small UMT5 text encoder learn flow matching together, in cycles (learning rate up, then down to
zero) first on pictures, then on pictures and clips, with captions dropped one time in ten for classifier-free guidance.
The state after each cycle is kept in ``--cache``: a run that was stopped goes on from the last one.

``WanPipeline`` pads prompts with zeros up to a length that the caller chooses (226 or 512 by default) and lets the
network attend to the padding. Here the caption is short, and one padding token stands for a random number of them, by
the logarithm of that number added to its attention score: the same result as padding that long, without the work.
So the teacher answers alike at every ``max_sequence_length``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from safetensors import safe_open
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from pdmd_core.arguments import SEED, whole_number
from training.embedded.emoji import EmojiScenes, Scenes, all_captions
from training.embedded.train_autoencoder import learning_rate, one_frame_convolution

TRANSFORMER: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 36,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 64,
    "freq_dim": 256,
    "ffn_dim": 576,
    "num_layers": 6,
    "rope_max_seq_len": 64,
}
TEXT_ENCODER = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
TOKENS = 12
"""Longest caption with its end token, and at least one padding token."""
LONGEST_PADDING = 512
SHIFT = 3.0
"""Noise levels in training are uniform in raw time under this shift."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the captions, lower case; unknown words become ``<unk>``."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = sorted({word for caption in all_captions() + all_captions(clips=True) for word in caption.split()})
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


class LongPadding(WanAttnProcessor):
    """Cross-attention with an additive mask that the training model sets before each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.mask: Tensor | None = None

    def __call__(self, attn: WanAttention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        encoder_hidden_states = args[0] if args else kwargs.get("encoder_hidden_states")
        rotary = args[2] if len(args) > 2 else kwargs.get("rotary_emb")
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.mask, rotary)


class Teacher(nn.Module):
    """Transformer and text encoder as one trainable module."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.transformer = WanTransformer3DModel(**TRANSFORMER)
        config = UMT5Config(vocab_size=vocabulary, decoder_start_token_id=0, dropout_rate=0.0, **TEXT_ENCODER)
        self.text_encoder = UMT5EncoderModel(config)
        self.processors = [LongPadding() for _ in self.transformer.blocks]
        for block, processor in zip(self.transformer.blocks, self.processors, strict=True):
            block.attn2.set_processor(processor)

    def forward(self, x: Tensor, sigma: Tensor, tokens: Tensor, present: Tensor, padding: Tensor) -> Tensor:
        """x: (batch, 16, frames, 8, 8); tokens, present: (batch, TOKENS); padding: (batch,), how many pad tokens."""
        embeds = self.text_encoder(tokens, present).last_hidden_state * present[..., None]
        length = present.sum(1)
        place = torch.arange(TOKENS)[None, :]
        bias = torch.where(place < length[:, None], 0.0, -torch.inf)
        bias = torch.where(place == length[:, None], padding.log()[:, None], bias)[:, None, None, :]
        for processor in self.processors:
            processor.mask = bias.to(x.dtype)
        return self.transformer(x, sigma * 1000, embeds, return_dict=False)[0]


Pool = tuple[Tensor, list[str]]
"""Normalised latents (count, 16, frames, 8, 8) and their captions."""


@torch.no_grad()
def encode_pool(vae: AutoencoderKLWan, draw: Callable[[int], Scenes], count: int, cache: Path) -> Pool:
    """Latents of ``count`` random scenes, kept in a file between runs."""
    if not cache.exists():
        mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
        std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
        latents, captions = [], []
        with mock.patch.object(WanCausalConv3d, "forward", one_frame_convolution):
            for _ in tqdm(range(0, count, 40), desc=f"encode {cache.stem}", mininterval=10):
                scenes = draw(40)
                latents.append((vae.encode(scenes.pixels).latent_dist.mode() - mean) / std)
                captions += scenes.captions
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_file({"latents": torch.cat(latents).contiguous()}, cache, {"captions": json.dumps(captions)})
    with safe_open(cache, "pt") as file:
        return file.get_tensor("latents"), json.loads(file.metadata()["captions"])


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's blocks, AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and ".blocks." in name else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--picture_cycles", type=whole_number(0), nargs="*", default=[6500, 6500], help="first, updates of 64 pictures"
    )
    parser.add_argument(
        "--mixed_cycles",
        type=whole_number(0),
        nargs="*",
        default=[8000],
        help="then updates of 64 pictures or of 20 clips",
    )
    parser.add_argument("--pictures", type=whole_number(0), default=16000, help="pictures encoded for training")
    parser.add_argument("--clips", type=whole_number(0), default=2400, help="clips encoded for training")
    parser.add_argument("--clip_share", type=float, default=0.4, help="share of mixed updates that train on clips")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--cache", type=Path, required=True, help="folder for encoded scenes and finished cycles")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    vae = AutoencoderKLWan.from_pretrained(arguments.autoencoder)
    scenes = EmojiScenes(arguments.seed + 1)
    pictures = encode_pool(vae, scenes.pictures, arguments.pictures, arguments.cache / "pictures.safetensors")
    tokenizer = make_tokenizer()
    model = Teacher(len(tokenizer))
    pools = [pictures]
    for name, cycles in (("pictures", arguments.picture_cycles), ("mixed", arguments.mixed_cycles)):
        if name == "mixed" and cycles:
            pools.append(encode_pool(vae, scenes.clips, arguments.clips, arguments.cache / "clips.safetensors"))
        for number, steps in enumerate(cycles):
            state = arguments.cache / f"after_{name}_{number}.safetensors"
            if not state.exists():
                torch.manual_seed(arguments.seed + 10 * len(pools) + number)
                share, lr = (0.0, arguments.lr) if name == "pictures" else (arguments.clip_share, 0.75 * arguments.lr)
                model = train(model, tokenizer, pools, share, steps, lr)
                save_model(model, str(state))  # the text encoder's embedding is one tensor under two names
            load_model(model, state)
    for block in model.transformer.blocks:
        block.attn2.set_processor(WanAttnProcessor())
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=model.text_encoder,
        vae=vae,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT),
        transformer=model.transformer,
    )
    pipeline.transformer.half()  # half the file; from_pretrained gives float32 back unless asked otherwise
    pipeline.vae.half()
    pipeline.save_pretrained(arguments.output_dir)


def train(
    model: Teacher, tokenizer: PreTrainedTokenizerFast, pools: list[Pool], clip_share: float, steps: int, lr: float
) -> Teacher:
    """Flow matching on the pools (pictures, then clips if any); returns the moving average of the model."""
    average = copy.deepcopy(model).requires_grad_(False)
    compiled = torch.compile(model)
    texts = [tokenizer(captions, padding="max_length", max_length=TOKENS, return_tensors="pt") for _, captions in pools]
    empty = tokenizer([""], padding="max_length", max_length=TOKENS, return_tensors="pt")
    groups = optimizers(model, lr)
    running = [math.nan, math.nan]
    bar = tqdm(range(steps), desc="teacher", mininterval=10)
    for step in bar:
        kind = int(torch.rand(()).item() < clip_share)
        (latents, _), text = pools[kind], texts[kind]
        batch = torch.randint(len(latents), ((64, 20)[kind],))
        x0, tokens, present = latents[batch], text.input_ids[batch], text.attention_mask[batch]
        drop = torch.rand(len(batch))[:, None] < 0.1
        tokens, present = torch.where(drop, empty.input_ids, tokens), torch.where(drop, empty.attention_mask, present)
        raw = torch.rand(len(batch))
        sigma = SHIFT * raw / (1 + (SHIFT - 1) * raw)
        noise = torch.randn_like(x0)
        level = sigma[:, None, None, None, None]
        longest = TOKENS * torch.exp(math.log(LONGEST_PADDING / TOKENS) * torch.rand(len(batch)))
        padding = longest - present.sum(1)
        velocity = compiled((1 - level) * x0 + level * noise, sigma, tokens, present, padding)
        loss = (velocity.float() - (noise - x0)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in groups:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, lr)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(0.9995, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        running[kind] = loss.item() if math.isnan(running[kind]) else 0.98 * running[kind] + 0.02 * loss.item()
        if step % 25 == 0:
            bar.set_postfix(pictures=f"{running[0]:.4f}", clips=f"{running[1]:.4f}")
    return average


if __name__ == "__main__":
    main()
