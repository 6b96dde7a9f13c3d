"""Questions that users ask, answered on the embedded teacher: ``python benchmarks/questions.py``.

Each question is a table of trainings, or of samples, that differ in what is asked and in nothing else. What was
trained is kept in --work_dir; a run that was cut off goes on. Runs of few updates go first. The report is written of
what is there, the page and its numbers in questions.json beside it. About five hours on an idle core; --questions and
--rows run some, and --published keeps what docs/evidence has of the others.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.claims.common.evidence import Row, Spread, markdown_table, rounded
from benchmarks.claims.common.files import check_rows, write_text
from benchmarks.claims.common.methods import Method, Run
from benchmarks.claims.common.variants import OF_RECIPES, VARIANTS
from benchmarks.claims.embedded.study import SETTINGS, EmbeddedStudy
from pdmd_core.arguments import COUNT, output_file
from pdmd_core.roles import RoleSpec

ROOT = Path(__file__).resolve().parents[1]
LR = 3e-3
"""Of batches of 32 with LoRAs; of others by the square root of the batch."""
FULL_LR = 0.1
"""Times the learning rate of LoRAs: that of full copies."""
USUAL = VARIANTS[OF_RECIPES]
BATCHES, RANKS, GUIDANCES = (1, 4, 16, 64), (4, 16, 64), (1.0, 2.0, 3.0, 4.0, 6.0)
FAKES = (4, 64, None)
"""Ranks of the fakes that are compared at each size of a batch; None is a full one."""
LONGER = (1, 2, 4, 10)
"""Times the updates."""
STRENGTHS = (0.4, 0.6, 0.8, 1.0, 1.2, 1.4)


@dataclass(frozen=True)
class Question:
    """What is asked."""

    title: str
    note: str
    """What the rows have in common."""
    header: tuple[str, ...]
    """Of the columns that say what differs."""


_STRENGTH = "The shipped experts, which a teacher with guidance 3 taught, in their four steps."
QUESTIONS = {
    "batch": Question(
        "Does a small batch over-saturate, and does a full fake help?",
        "The method of the recipes, experts of rank 16. Every row has seen as many samples; its learning rate is 3e-3 "
        "x sqrt(batch / 32), a tenth of that for full fakes.",
        ("batch", "fake"),
    ),
    "extracted": Question(
        "Direct LoRA experts, or LoRAs extracted from full ones?",
        "The method of the recipes, batch 32, fakes as the experts, learning rate 3e-3, a tenth of it for full experts "
        "and fakes. An extracted LoRA is the nearest of its rank, by SVD.",
        ("experts",),
    ),
    "longer": Question(
        "Does quality fall in long trainings, and which sign tells?",
        "The method of the recipes, batch 32, learning rate 3e-3, which falls over the last 30 %.",
        ("updates",),
    ),
    "guidance": Question(
        "How much guidance of the teacher?",
        "The method of the recipes, batch 32, learning rate 3e-3; each row against the teacher with the same guidance.",
        ("guidance",),
    ),
    "strength_pictures": Question("At which strength are LoRA experts used? Pictures", _STRENGTH, ("strength",)),
    "strength_clips": Question(
        "At which strength are LoRA experts used? Clips",
        f"{_STRENGTH} They learned pictures and were never trained on clips.",
        ("strength",),
    ),
}
COLUMNS = (
    ("distance to the teacher", "score", 4),
    ("diversity, % of the teacher's", "diversity", 0),
    ("flow, %", "motion", 0),
    ("saturation, %", "saturation", 1),
    ("contrast, %", "contrast", 1),
    ("agreement with the prompt, %", "agreement", 1),
)
"""Title, column and digits; what is in % of the teacher's in the same noise, but agreement."""
Answers = dict[str, dict[str, dict[str, dict[str, float]]]]
"""Question, row, seed and column to what is shown."""
PUBLISHED = ROOT / "docs" / "evidence" / "questions.json"
_BETWEEN = " | "


@dataclass(frozen=True)
class Entry:
    """A row of a table: a run, or samples that need no training."""

    cells: tuple[str, ...]
    """What differs, as it is written."""
    study: EmbeddedStudy
    run: Run | None = None
    extracted: int | None = None
    """The rank of LoRAs that are measured in place of full experts."""
    reference: str = ""
    """Samples without a training, as the study calls them."""

    @property
    def name(self) -> str:
        """Its cells."""
        return _BETWEEN.join(self.cells)

    def updates(self) -> int:
        """Of its training."""
        return self.run.updates if self.run else 0

    def row(self, seed: int, work: bool) -> Row | None:
        """Train and measure it with a seed; without ``work`` only where that was done."""
        if self.run is None:
            there = self.study.has_reference(self.reference, seed)
            return self.study.reference_row(self.reference, seed) if work or there else None
        run = replace(self.run, seed=seed)
        there = self.study.has_row(run, extracted=self.extracted)
        return self.study.row(run, extracted=self.extracted) if work or there else None

    def teacher(self, seed: int) -> Row:
        """Its teacher, in the same noise."""
        return self.study.reference_row(f"teacher_{self.study.measuring.teacher_steps}", seed)


def at_batch(batch: int, fake: int | None) -> tuple[Method, float]:
    """The method of the recipes at a batch size, with a fake of a rank or a full one, and its learning rate."""
    lr = LR * (batch / SETTINGS["pictures"].recipe.batch_size) ** 0.5
    recipe = {"batch_size": batch, "fake_lr_factor": FULL_LR if fake is None else 1.0}
    spec = RoleSpec("full") if fake is None else RoleSpec("lora", fake, float(fake))
    return replace(USUAL, key=f"batch_{batch}_fake_{fake or 'full'}", recipe=recipe, fake=spec), lr


def entries(question: str, work_dir: Path) -> Iterator[Entry]:
    """The rows of a question's table."""
    clips = question == "strength_clips"
    study = make_study(work_dir, "clips" if clips else "pictures", None)
    updates, batch_size = study.updates, study.settings.recipe.batch_size
    if question == "batch":
        for batch in BATCHES:
            for fake in FAKES:
                method, lr = at_batch(batch, fake)
                run = Run(method, lr, 0, updates * batch_size // batch)
                yield Entry((str(batch), "full" if fake is None else f"rank {fake}"), study, run)
    elif question == "extracted":
        full = replace(USUAL, key="full", expert=RoleSpec("full"), fake=RoleSpec("full"))
        of_full = Run(full, FULL_LR * LR, 0, updates)
        for rank in RANKS:
            spec = RoleSpec("lora", rank, float(rank))
            usual = rank == study.settings.rank  # what other questions train, too
            method = USUAL if usual else replace(USUAL, key=f"rank_{rank}", expert=spec, fake=spec)
            yield Entry((f"trained as LoRAs of rank {rank}",), study, Run(method, LR, 0, updates))
        yield Entry(("full",), study, of_full)
        for rank in RANKS:
            yield Entry((f"full, extracted at rank {rank}",), study, of_full, rank)
    elif question == "longer":
        for times in LONGER:
            yield Entry((str(times * updates),), study, Run(USUAL, LR, 0, times * updates))
    elif question == "guidance":
        for scale in GUIDANCES:
            yield Entry((f"{scale:g}",), make_study(work_dir, "pictures", scale), Run(USUAL, LR, 0, updates))
    else:
        for strength in STRENGTHS:  # the shipped experts were distilled at guidance 3
            guided = make_study(work_dir, study.teacher, 3.0)
            yield Entry((f"{strength:g}",), guided, reference=f"experts_4_at_{strength:g}")


def make_study(work_dir: Path, teacher: str, guidance_scale: float | None) -> EmbeddedStudy:
    """The study of pictures or clips, with another guidance of the teacher where one is given."""
    settings = SETTINGS[teacher]
    return EmbeddedStudy(work_dir, teacher, replace(settings, guidance_scale=guidance_scale or settings.guidance_scale))


def answer(entry: Entry, seed: int) -> dict[str, float] | None:
    """The columns of a row, as they are shown; None before it was measured."""
    row, values = entry.row(seed, work=False), {}
    if row is None:
        return None
    for _, column, _ in COLUMNS:
        value, of_teacher = row.value(column), entry.teacher(seed).value(column)
        if value is not None and of_teacher is not None:
            relative = column in {"diversity", "motion", "saturation", "contrast"}
            values[column] = 100 * value / of_teacher if relative else value * (100 if column == "agreement" else 1)
    return rounded(values)


def answers(work_dir: Path, seeds: int, published: Answers) -> Answers:
    """What was measured, by question, row and seed; of ``published`` what is not there."""
    found: Answers = {}
    for question in QUESTIONS:
        known = published.get(question, {})
        for entry in entries(question, work_dir):
            own = {str(seed): row for seed in range(seeds) if (row := answer(entry, seed)) is not None}
            if by_seed := known.get(entry.name, {}) | own:
                found.setdefault(question, {})[entry.name] = by_seed
    return found


def report(found: Answers) -> str:
    """The page of what was measured."""
    parts = [
        "# Questions",
        "",
        "Each table differs in its first columns and in nothing else. Distances are Frechet distances to the "
        "teacher's 40-step samples of other noise; other columns compare with its samples of the same noise. With more "
        "than one seed: mean ± standard deviation. What is not listed was not run yet. Written by "
        "`python benchmarks/questions.py --stages report`.",
        "",
    ]
    for question, rows in found.items():
        asked, lines = QUESTIONS[question], []
        for name, by_seed in rows.items():
            columns = [[row[column] for row in by_seed.values() if column in row] for _, column, _ in COLUMNS]
            cells = [
                Spread.of(values).text(1, digits) if values else ""
                for values, (_, _, digits) in zip(columns, COLUMNS, strict=True)
            ]
            lines.append([*name.split(_BETWEEN), *cells, str(len(by_seed))])
        header = (*asked.header, *(title for title, *_ in COLUMNS), "seeds")
        shown = [i for i in range(len(header)) if any(line[i] for line in lines)]
        table = markdown_table([header[i] for i in shown], [[line[i] for i in shown] for line in lines])
        parts += [f"## {asked.title}", "", asked.note, "", table, ""]
    return "\n".join(parts)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", nargs="+", choices=list(QUESTIONS), default=list(QUESTIONS))
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW", help='of these questions: their first columns, as in "16 | full" or 240'
    )
    parser.add_argument("--stages", nargs="+", choices=("train", "report"), default=["train", "report"])
    parser.add_argument("--seeds", type=COUNT, default=1, help="of each row (default: 1)")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "runs" / "questions")
    parser.add_argument(
        "--published",
        action="store_true",
        help="rows of docs/evidence/questions.json stay where --work_dir has none, and are not trained again",
    )
    parser.add_argument("--output", type=output_file(".md"), default=PUBLISHED.with_suffix(".md"))
    options = parser.parse_args(arguments)
    if options.rows is not None:
        known = [entry.name for question in options.questions for entry in entries(question, options.work_dir)]
        if unknown := [row for row in options.rows if row not in known]:
            parser.error(f"--rows: no {unknown[0]!r} in {', '.join(options.questions)}: choose from {'; '.join(known)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and measure what is missing, then report."""
    options = parse(arguments)
    torch.set_num_threads(1)
    published: Answers = json.loads(PUBLISHED.read_text(encoding="utf-8")) if options.published else {}
    if "train" in options.stages:
        for question in options.questions:
            for seed in range(options.seeds):
                for entry in sorted(entries(question, options.work_dir), key=Entry.updates):
                    if options.rows is not None and entry.name not in options.rows:
                        continue
                    if str(seed) in published.get(question, {}).get(entry.name, {}):
                        continue
                    entry.study.prepare()
                    row = entry.row(seed, work=True)
                    assert row is not None
                    entry.teacher(seed)
                    print(f"{question} {' '.join(entry.cells)} seed {seed}: {row.score:.5f}", flush=True)
    if "report" in options.stages:
        found = answers(options.work_dir, options.seeds, published)
        check_rows(found)
        write_text(options.output, report(found))
        write_text(options.output.with_suffix(".json"), json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
