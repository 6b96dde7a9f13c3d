"""The diagrams of the documentation, as SVG: ``python docs/site/diagrams.py`` writes them into ``docs/assets``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

BLUE, ORANGE, GREEN, GREY, WHITE = "#d7e4f5", "#fbe3cd", "#dbeedb", "#eeeeee", "#ffffff"
"""Fills: the library and the expert that trains; the fake; the teacher; what is not trained; data."""
INK, RED = "#22262b", "#b3261e"


class Drawing:
    """Boxes, arrows and text on a white ground."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
            f'font-size="14" fill="{INK}">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0 0 10 5 0 10z" fill="{INK}"/></marker>'
            '<marker id="red" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0 0 10 5 0 10z" fill="{RED}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="{WHITE}"/>',
        ]

    def text(self, x: float, y: float, words: str, *, size: int = 14, anchor: str = "middle", style: str = "") -> None:
        """One line of text; ``y`` is its base line."""
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}"{style}>{escape(words)}</text>'
        )

    def box(self, x: float, y: float, w: float, h: float, lines: Sequence[str], fill: str = WHITE) -> None:
        """A box; its first line is bold, the others are small."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" fill="{fill}" stroke="{INK}" stroke-width="1.2"/>'
        )
        top = y + h / 2 - 8.5 * (len(lines) - 1) + 5
        for number, line in enumerate(lines):
            bold = ' font-weight="bold"' if number == 0 else ""
            size = 12 if number else 14 if len(line) < 22 else 13
            self.text(x + w / 2, top + 17 * number, line, size=size, style=bold)

    def frame(self, x: float, y: float, w: float, h: float, title: str, note: str, fill: str) -> None:
        """A large box with its title at the top left, for boxes to stand in."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="8" fill="{fill}" stroke="{INK}" stroke-width="1.6"/>'
        )
        self.text(x + 14, y + 24, title, size=16, anchor="start", style=' font-weight="bold"')
        self.text(x + 14, y + 42, note, size=12, anchor="start")

    def arrow(self, points: Sequence[tuple[float, float]], words: str = "", *, gradient: bool = False) -> None:
        """A line along points with a head at its end; a gradient is red and dashed."""
        path = "M" + "L".join(f"{x} {y}" for x, y in points)
        colour, head, dash = (RED, "red", ' stroke-dasharray="6 4"') if gradient else (INK, "head", "")
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6"{dash} marker-end="url(#{head})"/>'
        )
        if words:
            (x1, y1), (x2, y2) = points[:2]
            self.text((x1 + x2) / 2, (y1 + y2) / 2 - 6, words, size=12)

    def svg(self) -> str:
        """The document."""
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def phases() -> str:
    """The noise range of a plan with two phases of two steps, shift 5."""
    drawing = Drawing(880, 250, "A phase plan: two phases of two steps, shift 5")
    left, right = 60, 820

    def place(sigma: float) -> float:
        return round(left + (1 - sigma) * (right - left), 1)

    sigmas = (1.0, 0.9375, 0.8333, 0.625)
    boundary = place(sigmas[2])
    for start, end, fill, words in (
        (left, boundary, BLUE, "phase 1: high_noise"),
        (boundary, right, ORANGE, "phase 2: low_noise"),
    ):
        drawing.parts.append(f'<rect x="{start}" y="70" width="{end - start:.1f}" height="80" fill="{fill}"/>')
        drawing.text((start + end) / 2, 92, words, size=12, style=' font-weight="bold"')
    drawing.arrow([(left, 125), (right + 20, 125)])
    for number, sigma in enumerate(sigmas):
        x = place(sigma)
        drawing.parts.append(f'<circle cx="{x}" cy="125" r="6"/>')
        drawing.text(x, 172, f"{sigma:g}", size=13)
        drawing.text(x, 190, f"step {number + 1}", size=12)
    drawing.text(right, 172, "0", size=13)
    drawing.text(right, 190, "sample", size=12)
    drawing.text(left - 4, 30, "sigma = 1: pure noise", anchor="start", size=13)
    drawing.text(right + 4, 30, "sigma = 0: data", anchor="end", size=13)
    drawing.parts.append(f'<path d="M{boundary} 40V160" stroke="{INK}" stroke-width="1.4" stroke-dasharray="4 3"/>')
    drawing.text(boundary + 6, 48, "boundary s: the first expert ends here with x_s", anchor="start", size=12)
    note = "Each dot is one evaluation of the expert whose band it is in; on a boundary that is the later expert."
    drawing.text(440, 232, note, size=12)
    return drawing.svg()


def update() -> str:
    """The two kinds of steps of one update of a phase, with where gradients go."""
    drawing = Drawing(1000, 560, "One update of a phase: steps of the fake, then one step of the expert")
    for top, title in (
        (20, "Step of the fake (several for each step of the expert): follow what the expert samples now"),
        (270, "Step of the expert: move its samples from where the fake says they are to where the teacher says"),
    ):
        drawing.text(20, top + 12, title, anchor="start", size=15, style=' font-weight="bold"')
    y = 70
    drawing.box(20, y, 90, 50, ["noise", "sigma = 1"])
    drawing.arrow([(110, y + 25), (140, y + 25)])
    drawing.box(140, y - 10, 190, 70, ["rollout", "experts of earlier phases,", "then the expert; no gradient"], GREY)
    drawing.arrow([(330, y + 25), (370, y + 25)])
    drawing.box(370, y, 80, 50, ["x_s", "sigma = s"])
    drawing.arrow([(450, y + 25), (560, y + 25)], "noise to t > s")
    drawing.box(560, y, 80, 50, ["x_t", "sigma = t"])
    drawing.arrow([(640, y + 25), (680, y + 25)])
    drawing.box(680, y, 100, 50, ["fake", "velocity at t"], ORANGE)
    drawing.arrow([(780, y + 25), (820, y + 25)])
    drawing.box(820, y - 10, 160, 70, ["fake loss", "weighted distance to", "the unbiased target"])
    drawing.arrow([(410, y + 50), (410, y + 95), (900, y + 95), (900, y + 60)])
    drawing.text(640, y + 89, "target: the velocity that x_s and the new noise imply", size=12)
    drawing.arrow([(850, y + 60), (850, y + 122), (730, y + 122), (730, y + 50)], gradient=True)
    drawing.text(790, y + 138, "gradient: the fake alone", size=12, style=f' fill="{RED}"')
    y = 330
    drawing.box(20, y, 90, 50, ["noise", "sigma = 1"])
    drawing.arrow([(110, y + 25), (140, y + 25)])
    drawing.box(140, y - 10, 190, 70, ["rollout", "as above; the drawn step", "of the expert has a gradient"], BLUE)
    drawing.arrow([(330, y + 25), (370, y + 25)])
    drawing.box(370, y, 80, 50, ["x_s", "sigma = s"])
    drawing.arrow([(450, y + 25), (560, y + 25)], "noise to t > s")
    drawing.box(560, y, 80, 50, ["x_t", "sigma = t"])
    drawing.arrow([(640, y + 15), (660, y + 15), (660, y - 15), (680, y - 15)])
    drawing.arrow([(640, y + 35), (660, y + 35), (660, y + 65), (680, y + 65)])
    drawing.box(680, y - 40, 120, 50, ["teacher", "with guidance"], GREEN)
    drawing.box(680, y + 40, 120, 50, ["fake", "without"], ORANGE)
    drawing.arrow([(800, y - 15), (912, y - 15), (912, y)])
    drawing.arrow([(800, y + 65), (880, y + 65), (880, y + 50)])
    drawing.box(840, y, 145, 50, ["direction", "w (v_teacher - v_fake)"])
    drawing.box(340, y + 120, 140, 50, ["generator loss", "on x_s"])
    drawing.arrow([(960, y + 50), (960, y + 145), (480, y + 145)])
    drawing.text(715, y + 139, "becomes the gradient of the loss with respect to x_s", size=12)
    drawing.arrow([(410, y + 50), (410, y + 120)])
    drawing.arrow([(340, y + 145), (235, y + 145), (235, y + 60)], gradient=True)
    drawing.text(226, y + 162, "gradient: the expert alone", size=12, style=f' fill="{RED}"')
    note = "s: sigma at the end of the phase. t: drawn between s and 1. Roles may be adapters on one frozen base."
    drawing.text(20, 545, note, anchor="start", size=12)
    return drawing.svg()


def house() -> str:
    """The packages and what is in them; arrows say who imports whom."""
    drawing = Drawing(1000, 610, "The packages: comfy_nodes and training import pdmd_core, never the reverse")
    drawing.frame(20, 20, 220, 330, "comfy_nodes", "the ComfyUI node pack", BLUE)
    for number, lines in enumerate(
        (
            ["nodes", "experts, plans, sampler"],
            ["composite", "one MODEL of all experts"],
            ["timeline, notices", "what a user sees"],
            ["web, locales, workflows", "beside the package"],
        )
    ):
        drawing.box(36, 76 + 66 * number, 188, 54, lines)
    drawing.frame(300, 20, 400, 430, "pdmd_core", "the library: imports with torch and safetensors alone", ORANGE)
    cells = (
        ["phases", "the phase plan"],
        ["flow, objectives", "formulas of the paper"],
        ["rollout, distillation", "an update of a phase"],
        ["roles", "teacher, experts, fake"],
        ["families/", "all facts of a model family"],
        ["scheduler, sampling", "walk the plan's sigmas"],
        ["experts/", "format, hub, convert"],
        ["pipelines/", "experts in diffusers"],
        ["metrics/", "distances, diversity, motion"],
    )
    for number, lines in enumerate(cells):
        wide = number == len(cells) - 1
        drawing.box(316 + 188 * (number % 2), 76 + 72 * (number // 2), 368 if wide else 180, 60, lines)
    drawing.frame(760, 20, 220, 480, "training", "the application", GREEN)
    for number, lines in enumerate(
        (
            ["distill, sample, evaluate", "the commands"],
            ["config, configs", "keys, recipes"],
            ["data, prompts", "examples, prompt cache"],
            ["loop", "build, updates, checkpoints"],
            ["distributed, memory", "sharding, offloading"],
            ["monitoring, evaluation", "reports, alerts"],
            ["embedded", "the teacher that ships"],
        )
    ):
        drawing.box(776, 76 + 60 * number, 188, 50, lines)
    drawing.arrow([(240, 180), (300, 180)], "imports")
    drawing.arrow([(760, 180), (700, 180)], "imports")
    drawing.box(
        300,
        520,
        400,
        70,
        [
            "experts folder, or repository on the Hub",
            "phased_experts.json, one safetensors file for each expert,",
            "scheduler, model card",
        ],
        GREY,
    )
    drawing.arrow([(870, 500), (870, 555), (700, 555)])
    drawing.text(785, 549, "writes", size=12)
    drawing.arrow([(500, 520), (500, 450)])
    drawing.text(508, 490, "read and checked by experts/", anchor="start", size=12)
    drawing.arrow([(300, 555), (130, 555), (130, 350)])
    drawing.text(215, 549, "loads", size=12)
    return drawing.svg()


DIAGRAMS: dict[str, Callable[[], str]] = {"phases": phases, "update": update, "house": house}
"""Name of each file to what draws it."""

if __name__ == "__main__":
    for name, draw in DIAGRAMS.items():
        (Path(__file__).parents[1] / "assets" / f"{name}.svg").write_text(draw(), encoding="utf-8")
