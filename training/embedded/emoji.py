"""Captioned pictures and short clips of emoji: the data behind the embedded teacher.

The artwork is Noto Color Emoji (Debian package ``fonts-noto-color-emoji``, OFL-1.1), drawn from the font at run time;
nothing of it is stored here. A scene is one emoji, placed, scaled and rotated over a plain background; a clip moves it.
Captions follow two patterns::

    a panda on a blue background                  (pictures)
    a panda moves left on a blue background       (clips)

What a caption does not say (place, size, pose, speed) is random: that is the diversity a generator has to keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")

EMOJI: dict[str, str] = {
    "red heart": "\u2764",
    "dog": "\U0001f436",
    "cat": "\U0001f431",
    "panda": "\U0001f43c",
    "frog": "\U0001f438",
    "fox": "\U0001f98a",
    "owl": "\U0001f989",
    "penguin": "\U0001f427",
    "turtle": "\U0001f422",
    "fish": "\U0001f420",
    "sunflower": "\U0001f33b",
    "mushroom": "\U0001f344",
    "apple": "\U0001f34e",
    "banana": "\U0001f34c",
    "strawberry": "\U0001f353",
    "watermelon": "\U0001f349",
    "pizza": "\U0001f355",
    "soccer ball": "\u26bd",
    "car": "\U0001f697",
    "rocket": "\U0001f680",
    "star": "\u2b50",
    "ghost": "\U0001f47b",
    "robot": "\U0001f916",
    "smiley": "\U0001f600",
}
"""Caption word(s) of each emoji."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "black": (20, 20, 20),
    "gray": (128, 128, 128),
    "red": (200, 40, 40),
    "green": (60, 160, 70),
    "blue": (50, 90, 200),
    "yellow": (245, 215, 80),
    "pink": (245, 160, 190),
}
"""Caption word of each background and its sRGB colour."""

MOTIONS: tuple[str, ...] = ("moves left", "moves right", "moves up", "moves down", "spins", "grows", "shrinks")

SIZE = 64
FRAMES = 9
_SPRITE = 56


def caption(emoji: str, background: str, motion: str | None = None) -> str:
    """The caption of a scene, for example ``an owl moves up on a gray background``."""
    article = "an" if emoji[0] in "aeiou" else "a"
    verb = f" {motion}" if motion else ""
    return f"{article} {emoji}{verb} on a {background} background"


def all_captions(clips: bool = False) -> list[str]:
    """Every caption of the closed vocabulary, of pictures or of clips, in a fixed order."""
    motions: tuple[str | None, ...] = MOTIONS if clips else (None,)
    return [caption(e, b, m) for e in EMOJI for b in BACKGROUNDS for m in motions]


def load_sprites(font: Path = FONT) -> torch.Tensor:
    """Draw all emoji once: premultiplied RGBA in [0, 1], shape (emoji, 4, 56, 56).

    Ends the program with the package to install when the font is missing.
    """
    if not font.exists():
        raise SystemExit(f"emoji font not found at {font}: install the Debian package fonts-noto-color-emoji")
    face = ImageFont.truetype(str(font), 109)  # the only size of the font's bitmaps
    sprites = []
    for symbol in EMOJI.values():
        canvas = Image.new("RGBA", (300, 160), (0, 0, 0, 0))
        ImageDraw.Draw(canvas).text((0, 0), symbol, font=face, embedded_color=True)
        drawn = canvas.crop(canvas.getbbox())
        side = max(drawn.size)
        square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
        square.paste(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
        pixels = torch.from_numpy(np.asarray(square).astype(np.float32) / 255).permute(2, 0, 1)
        premultiplied = torch.cat([pixels[:3] * pixels[3:], pixels[3:]])
        sprites.append(F.interpolate(premultiplied[None], size=(_SPRITE, _SPRITE), mode="area")[0])
    return torch.stack(sprites)


@dataclass
class Scenes:
    """A batch of scenes: pixels in [-1, 1] of shape (batch, 3, frames, 64, 64), captions, and what made them."""

    pixels: torch.Tensor
    captions: list[str]
    emoji: torch.Tensor
    background: torch.Tensor


class EmojiScenes:
    """Draws random captioned scenes, about a thousand pictures a second on one core."""

    def __init__(self, seed: int = 0, font: Path = FONT) -> None:
        self.sprites = load_sprites(font)
        self.colours = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32) / 255
        self.generator = torch.Generator().manual_seed(seed)

    def _uniform(self, count: int, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=self.generator)

    def _choice(self, count: int, options: int) -> torch.Tensor:
        return torch.randint(options, (count,), generator=self.generator)

    def pictures(self, count: int) -> Scenes:
        """Single frames: shape (count, 3, 1, 64, 64). Size 32 to 46 pixels, tilt up to 25 degrees, any place inside."""
        emoji, background = self._choice(count, len(EMOJI)), self._choice(count, len(BACKGROUNDS))
        size = self._uniform(count, 32, 46)
        half = size / 2
        x = half + (SIZE - size) * self._uniform(count, 0, 1)
        y = half + (SIZE - size) * self._uniform(count, 0, 1)
        angle = torch.deg2rad(self._uniform(count, -25, 25))
        pixels = self._draw(emoji, background, x[:, None], y[:, None], size[:, None], angle[:, None])
        names, colours = list(EMOJI), list(BACKGROUNDS)
        captions = [caption(names[int(e)], colours[int(b)]) for e, b in zip(emoji, background, strict=True)]
        return Scenes(pixels, captions, emoji, background)

    def clips(self, count: int) -> Scenes:
        """Clips of nine frames: shape (count, 3, 9, 64, 64). Speed 1.5 to 3 pixels a frame, inside the picture."""
        emoji, background = self._choice(count, len(EMOJI)), self._choice(count, len(BACKGROUNDS))
        motion = self._choice(count, len(MOTIONS))
        time = torch.arange(FRAMES, dtype=torch.float32)[None, :]
        speed = self._uniform(count, 1.5, 3)[:, None]
        small, large = self._uniform(count, 22, 28)[:, None], self._uniform(count, 40, 48)[:, None]
        still = self._uniform(count, 32, 40)[:, None].expand(-1, FRAMES)
        ramp = time / (FRAMES - 1)

        def is_motion(name: str) -> torch.Tensor:
            return (motion == MOTIONS.index(name))[:, None]

        size = torch.where(is_motion("grows"), small + (large - small) * ramp, still)
        size = torch.where(is_motion("shrinks"), large + (small - large) * ramp, size)
        dx = is_motion("moves right").float() - is_motion("moves left").float()
        dy = is_motion("moves down").float() - is_motion("moves up").float()
        turn = self._uniform(count, 14, 30)[:, None] * torch.where(self._choice(count, 2)[:, None] == 0, -1.0, 1.0)
        tilt = self._uniform(count, -20, 20)[:, None]
        angle = torch.deg2rad(torch.where(is_motion("spins"), tilt + turn * time, tilt.expand(-1, FRAMES)))
        half = size.amax(1, keepdim=True) / 2
        path = speed * (FRAMES - 1)
        start_x = self._start(half, dx * path)
        start_y = self._start(half, dy * path)
        x, y = start_x + dx * speed * time, start_y + dy * speed * time
        pixels = self._draw(emoji, background, x, y, size, angle)
        names, colours = list(EMOJI), list(BACKGROUNDS)
        captions = [
            caption(names[int(e)], colours[int(b)], MOTIONS[int(m)])
            for e, b, m in zip(emoji, background, motion, strict=True)
        ]
        return Scenes(pixels, captions, emoji, background)

    def _start(self, half: torch.Tensor, travel: torch.Tensor) -> torch.Tensor:
        """A start such that the whole path stays inside the picture."""
        low = half + (-travel).clamp(min=0)
        high = SIZE - half - travel.clamp(min=0)
        return low + (high - low).clamp(min=0) * self._uniform(len(half), 0, 1)[:, None]

    def _draw(
        self,
        emoji: torch.Tensor,
        background: torch.Tensor,
        x: torch.Tensor,
        y: torch.Tensor,
        size: torch.Tensor,
        angle: torch.Tensor,
    ) -> torch.Tensor:
        """Composite sprites by an affine map; x, y, size (pixels), angle (radians) have shape (batch, frames)."""
        batch, frames = x.shape
        cos, sin, scale = torch.cos(angle), torch.sin(angle), SIZE / size
        cx, cy = 2 * x / SIZE - 1, 2 * y / SIZE - 1
        rows = [
            torch.stack([cos * scale, sin * scale, -(cos * cx + sin * cy) * scale], -1),
            torch.stack([-sin * scale, cos * scale, (sin * cx - cos * cy) * scale], -1),
        ]
        grid = F.affine_grid(torch.stack(rows, -2).flatten(0, 1), [batch * frames, 4, SIZE, SIZE], align_corners=False)
        sprites = self.sprites[emoji].repeat_interleave(frames, 0)
        drawn = F.grid_sample(sprites, grid, align_corners=False)
        plain = self.colours[background].repeat_interleave(frames, 0)[:, :, None, None]
        rgb = drawn[:, :3] + (1 - drawn[:, 3:]) * plain
        return (rgb * 2 - 1).clamp(-1, 1).view(batch, frames, 3, SIZE, SIZE).transpose(1, 2).contiguous()
