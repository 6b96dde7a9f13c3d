"""Guided velocities, or what the guided teacher samples: ``python benchmarks/guided_samples.py``.

Two ways to distil pictures of the embedded teacher with guidance. Matching compares experts with guided velocities, as
DMD does. Or an expert of many steps first learns to denoise what the guided teacher samples, and matching compares with
its velocities, without guidance. Both are runs of the trainer, as a user starts them, at equal network evaluations: the
teacher's samples and the first training count, and a backward evaluation counts as two. What was trained is kept in
--work_dir; a run that was cut off goes on. Seed 0 chose the settings, others are reported. Half an hour for each
guidance and seed on an idle core. The page is written of what is there, and its numbers beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.claims.common.evidence import Spread, markdown_table, rounded
from benchmarks.claims.common.files import check_rows, write_text
from benchmarks.claims.common.variants import cost_of_updates
from benchmarks.claims.embedded.gallery import Gallery
from benchmarks.claims.embedded.measures import distances
from benchmarks.claims.embedded.study import EmbeddedStudy, noise_seed
from benchmarks.questions import make_study
from pdmd_core.arguments import COUNT, number, output_file
from pdmd_core.experts import PhasedExperts
from pdmd_core.experts.format.manifest import MANIFEST_NAME
from training.config.schema import DistillConfig, load_config
from training.loop.build import build_run
from training.loop.resumption import Resume
from training.loop.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "training" / "configs" / "embedded_demo.yaml"
DENOISER = CONFIG.with_name("embedded_denoising.yaml")
"""The recipe of the expert that denoises what the guided teacher samples."""
USUAL = {
    "model.path": str(ROOT / "training" / "embedded" / "models" / "teacher"),
    "data.prompts": str(ROOT / "training" / "prompts" / "embedded_pictures.txt"),
    "generator.lr": 3e-3,
    "fake.lr": 3e-3,
    "updates": 60,
    "validation.every": None,
    "monitoring.tracker": None,
}
"""Of all trainings: those of the evidence on pictures, in two phases."""
DENOISING: dict[str, Any] = {"ema_decay": 0.99, "lr_decay_share": 0.5}
"""What is different here from that recipe."""
VELOCITIES, SAMPLES = "guided velocities", "the teacher's samples"
WAYS = (VELOCITIES, SAMPLES)
COLUMNS = (
    ("distance to the teacher", "distance", 4),
    ("of layout", "layout", 0),
    ("coverage, %", "coverage", 1),
    ("diversity, % of the teacher's", "diversity", 0),
    ("contrast, %", "contrast", 1),
    ("agreement with the prompt, %", "agreement", 1),
)
"""Title, column and digits; what is in % of the teacher's in the same noise, but agreement."""
PUBLISHED = ROOT / "docs" / "evidence" / "guided_samples.json"
Row = dict[str, Any]


def configuration(folder: Path, seed: int, **changes: Any) -> DistillConfig:
    """The demo's recipe with other values, in dotted keys."""
    return _changed(CONFIG, USUAL | changes, folder, seed)


def denoising(folder: Path, seed: int, guidance: float) -> DistillConfig:
    """The recipe of an expert that denoises what the guided teacher samples."""
    usual = {key: value for key, value in USUAL.items() if key not in ("updates", "fake.lr")}
    return _changed(DENOISER, usual | DENOISING | {"objective.guidance_scale": guidance}, folder, seed)


def _changed(recipe: Path, values: dict[str, Any], folder: Path, seed: int) -> DistillConfig:
    values = values | {"seed": seed, "output_dir": str(folder)}
    return load_config(recipe, [f"{key}={json.dumps(value)}" for key, value in values.items()])


def evaluations(config: DistillConfig) -> float:
    """Network evaluations of a run, over samples; a backward one counts as two."""
    plan, objective, bank = config.plan.build(), config.objective, config.rollouts.bank or 0
    guided = objective.guidance_scale != 1
    choices = (config.fake_updates, config.draws_per_rollout, guided, bool(bank))
    forward, backward = cost_of_updates(plan, objective, *choices)
    updates = sum(config.updates_of(k) for k in range(len(plan)))  # as many in each phase
    made = bank * (1 + guided) * len(plan.sigmas) * objective.path_steps
    return updates * config.batch_size * (forward + 2 * backward) + made


def runs(way: str, guidance: float, seed: int, work_dir: Path) -> list[DistillConfig]:
    """The trainings of a way, one after the other; of both ways they have equal evaluations."""
    folder = work_dir / f"guidance-{guidance:g}-seed-{seed}"
    guided = {"objective.guidance_scale": guidance}
    first = denoising(folder / "denoising", seed, guidance)
    alone = {"objective.guidance_scale": 1.0}
    if way == SAMPLES:  # its teacher is there once it was trained
        taught = {"model.experts": str(first.output_dir / "experts")}
        return [first, configuration(folder / "samples", seed, **alone, **taught)]
    usual = configuration(folder, seed, **guided)
    whole = evaluations(first) + evaluations(configuration(folder, seed, **alone))
    updates = round(usual.updates_of(0) * whole / evaluations(usual))
    return [configuration(folder / "velocities", seed, **guided, updates=updates)]


def trained(config: DistillConfig) -> PhasedExperts:
    """The experts of a run; trained unless they are there."""
    folder = config.output_dir / "experts"
    if not (folder / MANIFEST_NAME).exists():
        Trainer(build_run(config, Resume())).run()
    return PhasedExperts.open(folder)


def measured(study: EmbeddedStudy, experts: PhasedExperts, seed: int) -> dict[str, float]:
    """The columns of a row, as they are shown."""
    steps = len(experts.manifest.plan.sigmas)
    found = study.measures.look(study.samples_of(experts, study.pairs(noise_seed(seed)), steps))
    teacher = study.reference_row(f"teacher_{study.measuring.teacher_steps}", seed)
    measuring = study.measuring
    columns = distances(found.features, study.reference, study.data, measuring.seeds, measuring.resamples)
    frechet, layout, coverage = (columns[name] for name in ("frechet", "frechet_layout", "coverage"))
    contrast, agreement, of_teacher = found.extra["contrast"], found.extra["agreement"], teacher.extra["contrast"]
    assert frechet and layout and coverage and contrast and agreement and of_teacher and teacher.diversity
    return rounded(
        {
            "distance": frechet,
            "layout": layout,
            "coverage": 100 * coverage,
            "diversity": 100 * found.diversity / teacher.diversity,
            "contrast": 100 * contrast / of_teacher,
            "agreement": 100 * agreement,
        }
    )


def train(way: str, guidance: float, seed: int, work_dir: Path) -> Row:
    """Train and measure a row, or read what is there."""
    path = work_dir / "rows" / f"{WAYS.index(way)}-guidance-{guidance:g}-seed-{seed}.json"
    if not path.exists():
        configs = runs(way, guidance, seed, work_dir)
        *_, experts = [trained(config) for config in configs]
        study = make_study(work_dir, "pictures", guidance)
        study.prepare()
        updates = sum(config.updates_of(k) for config in configs[-1:] for k in range(len(config.plan.build())))
        row = {"guidance": guidance, "way": way, "seed": seed, "updates": updates}
        row |= {"evaluations": sum(map(evaluations, configs)), **measured(study, experts, seed)}
        write_text(path, json.dumps(row) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))


def picture(guidance: float, seed: int, work_dir: Path, path: Path) -> None:
    """Samples of the teacher and of both ways from the same noise, in columns."""
    study = make_study(work_dir, "pictures", guidance)
    gallery, steps = Gallery(study), study.measuring.teacher_steps
    made = {way: PhasedExperts.open(runs(way, guidance, seed, work_dir)[-1].output_dir / "experts") for way in WAYS}
    gallery.frame(gallery.samples([(f"teacher, {steps} steps", steps), *made.items()]), 0).save(path)


def report(rows: Sequence[Row]) -> str:
    """The page of what was measured."""
    first, lines = load_config(DENOISER), []
    for guidance in sorted({row["guidance"] for row in rows}):
        for way in WAYS:
            own = [row for row in rows if (row["guidance"], row["way"]) == (guidance, way)]
            if own:
                cells = [Spread.of([row[column] for row in own]).text(1, digits) for _, column, digits in COLUMNS]
                cost = f"{own[0]['evaluations'] / 1000:.0f}"
                lines.append([f"{guidance:g}", way, str(own[0]["updates"]), cost, *cells, str(len(own))])
    titles = (title for title, *_ in COLUMNS)
    header = ("guidance", "what is matched", "updates", "thousand evaluations", *titles, "seeds")
    return "\n".join(
        [
            "# What the guided teacher samples",
            "",
            "Pictures, 2 x 2 with own increments, learning rate 3e-3, LoRAs of rank 16. *Guided velocities*: matching "
            "asks the teacher with guidance. *The teacher's samples*: an expert first learns to denoise "
            f"{first.rollouts.bank} samples of the guided teacher in {first.updates} updates, and "
            "matching asks it, without guidance. Updates are those of matching; evaluations those of the whole way, "
            "over samples, where a backward one counts as two. Frechet distances, in "
            "features of style and of layout, and coverage are to the guided teacher's 40-step samples of other noise; "
            "other columns compare with its samples of the same noise. Mean ± standard "
            "deviation over seeds that did not choose the settings. Written by `python benchmarks/guided_samples.py`.",
            "",
            "![the guided teacher, and experts of both ways, from the same noise](guided_samples.png)",
            "",
            markdown_table(header, lines),
            "",
        ]
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guidance", nargs="+", type=number(1), default=[3.0, 6.0], metavar="SCALE")
    parser.add_argument("--seeds", nargs="+", type=COUNT, default=[1, 2, 3], metavar="SEED")
    parser.add_argument("--stages", nargs="+", choices=("train", "report"), default=["train", "report"])
    parser.add_argument("--work_dir", type=Path, default=ROOT / "runs" / "guided_samples")
    parser.add_argument("--published", action="store_true", help="keep rows of the page that --work_dir has not")
    parser.add_argument("--output", type=output_file(".md"), default=PUBLISHED.with_suffix(".md"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and measure what is missing, then report."""
    options = parse(arguments)
    torch.set_num_threads(1)
    published = json.loads(PUBLISHED.read_text(encoding="utf-8")) if options.published and PUBLISHED.exists() else []
    rows = {(row["guidance"], row["way"], row["seed"]): row for row in published}
    for seed in options.seeds if "train" in options.stages else ():
        for guidance in options.guidance:
            for way in WAYS:
                if (guidance, way, seed) not in rows:
                    row = train(way, guidance, seed, options.work_dir)
                    print(f"guidance {guidance:g}, {way}, seed {seed}: {row['distance']:.5f}", flush=True)
    if "report" in options.stages:
        files = sorted((options.work_dir / "rows").glob("*.json"))
        for row in (json.loads(path.read_text(encoding="utf-8")) for path in files):
            rows[row["guidance"], row["way"], row["seed"]] = row
        check_rows(rows)
        ordered = [rows[key] for key in sorted(rows)]
        write_text(options.output, report(ordered))
        write_text(options.output.with_suffix(".json"), json.dumps(ordered, indent=1) + "\n")
        guidance = max(row["guidance"] for row in ordered)
        folder = options.work_dir / f"guidance-{guidance:g}-seed-{options.seeds[0]}"
        if (folder / "samples" / "experts").exists() and (folder / "velocities" / "experts").exists():
            picture(guidance, options.seeds[0], options.work_dir, options.output.with_name("guided_samples.png"))


if __name__ == "__main__":
    main()
