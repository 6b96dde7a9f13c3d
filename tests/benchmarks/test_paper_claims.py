"""The comparison on the mixture in a short form: real trainings of seconds, through the command itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import paper_claims
from benchmarks.claims.common.distilling import Distilled, distil
from benchmarks.claims.common.evidence import Row
from benchmarks.claims.common.methods import METHODS, Run
from benchmarks.claims.mixture import study as mixture_study
from benchmarks.claims.mixture.report import MixtureReport
from benchmarks.claims.mixture.study import MixtureStudy
from benchmarks.claims.mixture.training import MixtureProblem, Settings
from pdmd_core.evaluations import evaluations_per_update
from pdmd_core.method import Objective
from pdmd_core.objectives import fake_score_loss, generator_direction

SHORT = Settings(batch_size=128, width=64, initial_updates=400, ema_decay=0.9)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> MixtureStudy:
    return MixtureStudy(tmp_path_factory.mktemp("study"), SHORT, samples=2000)


@pytest.fixture
def command(study: MixtureStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[str], Path]]:
    """Arguments of a short run; the command's study is the short one."""
    monkeypatch.setattr(paper_claims, "make_study", lambda teacher, options: study)
    options = "--teacher mixture --methods phased_4x1 biased_4x1 --seeds 2 --lrs 1e-3 --updates 80"
    yield [*options.split(), "--output_dir", str(tmp_path / "evidence")], tmp_path / "evidence"


def test_the_biased_target_is_worse_and_the_evidence_says_so(command, study: MixtureStudy) -> None:
    arguments, folder = command
    paper_claims.main([*arguments, "--stages", "prepare", "equal", "report"])
    rows = [Row.from_dict(row) for row in json.loads((folder / "paper_claims.json").read_text("utf-8"))["rows"]]
    at_boundary = {
        key: [float(row.extra["boundary_kernel_distance"]) for row in rows if row.method == key]
        for key in ("phased_4x1", "biased_4x1")
    }
    assert [len(values) for values in at_boundary.values()] == [2, 2]
    assert min(at_boundary["biased_4x1"]) > 5 * max(at_boundary["phased_4x1"])
    of = {row.method: row for row in rows}
    assert of["phased_4x1"].network_evaluations == of["teacher_4"].network_evaluations == 4
    assert abs(of["exact"].score) < of["teacher_4"].score / 10
    assert of["phased_4x1"].motion is None
    assert of["phased_4x1"].extra["skipped_updates"] == 0
    text = (folder / "mixture.md").read_text("utf-8")
    assert text.count("| 4 x 1, biased target |") == 2
    assert "2 seeds" in text
    for name in ("mixture_samples.png", "mixture_scores.png"):
        assert (folder / name).stat().st_size > 10_000


def test_what_is_there_is_never_trained_again(command, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, folder = command
    paper_claims.main([*arguments, "--stages", "equal"])

    def refuse(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(mixture_study, "distil", refuse)
    monkeypatch.setattr(mixture_study, "fit_initial_network", refuse)
    paper_claims.main([*arguments, "--stages", "prepare", "equal", "report"])
    first = (folder / "paper_claims.json").read_text("utf-8")
    paper_claims.main([*arguments, "--stages", "report"])
    assert (folder / "paper_claims.json").read_text("utf-8") == first
    with pytest.raises(AssertionError, match="trained again"):
        paper_claims.main([*arguments, "--stages", "equal", "--seeds", "3"])


def test_longer_training_goes_on_until_it_stops_helping(command, study: MixtureStudy, monkeypatch) -> None:
    """Rows with made-up scores: 4 times is no better than twice, so 8 times is never trained.

    The best learning rate is not that of few updates, so the next lower one is tried too; lower ones are not.
    """
    arguments, _ = command
    scores, trained = {80: 1.0, 160: 0.5, 320: 0.49, 640: 0.1}, []

    def row(run: Run) -> Row:
        trained.append((run.method.key, run.updates, run.lr, run.seed))
        score = scores[run.updates] + (run.lr if run.updates > 80 else abs(run.lr - 3e-3))
        return Row("mixture", run.method.key, run.seed, 4, 0.0, 1.0, None, run.lr, run.updates, score)

    monkeypatch.setattr(study, "row", row)
    monkeypatch.setattr(study, "has_row", lambda run: run.updates == 80)
    paper_claims.main([*arguments, "--stages", "long", "--lrs", "1e-3", "3e-3", "1e-2", "3e-4"])
    longer = [entry for entry in trained if entry[1] > 80]
    assert longer == [
        ("phased_4x1", updates, lr, seed) for updates in (160, 320) for seed in (0, 1) for lr in (3e-3, 1e-3)
    ]


def test_truncation_is_looked_at_step_by_step(study: MixtureStudy) -> None:
    run = Run(METHODS["phased_2x2"], 1e-3, 0, 80)
    path = study.walk(run, 3, 100)
    jumped, whole = study.truncated(run, 3, 100)
    torch.testing.assert_close(whole, path.samples)
    _, (_, last) = study._experts(run)
    assert path.at_boundary is not None and path.boundary is not None
    with torch.no_grad():
        velocity = last(path.at_boundary, path.boundary)
    torch.testing.assert_close(jumped, path.at_boundary - path.boundary * velocity)
    references = [study.reference_row(name, 0) for name in study.references]
    text = MixtureReport(study, [*references, study.row(run)], 80).markdown()
    section = text.partition("## What truncation matches")[2].partition("\n## ")[0]
    (line,) = [line for line in section.splitlines() if "2 x 2" in line]
    assert len(line.split("|")) == 6, "all together, from both steps"
    other = study.row(Run(METHODS["phased_4x1"], 1e-3, 0, 80))
    assert "truncation" not in MixtureReport(study, [*references, other], 80).markdown()


def test_phases_are_looked_at_one_by_one(study: MixtureStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(METHODS["phased_2x2"], 1e-3, 0, 80)
    path = study.walk(run, 3, 100)
    first, last = study.phase_ends(run, 3, 100)
    assert (first.sigma, last.sigma) == (path.boundary, 0.0)
    torch.testing.assert_close(first.chained, path.at_boundary)
    torch.testing.assert_close(last.chained, path.samples)
    references = [study.reference_row(name, 0) for name in study.references]
    text = MixtureReport(study, [*references, study.row(run)], 80).markdown()
    (line,) = [line for line in text.partition("## Phase by phase")[2].splitlines() if "2 x 2" in line]
    assert len(line.split("|")) == 6, "name, updates, the ends of both phases"

    plan, _ = study._experts(run)
    monkeypatch.setattr(study, "_experts", lambda _: (plan, [lambda x, sigma: torch.zeros_like(x)] * 2))
    first, last = study.phase_ends(run, 3, 20_000)
    torch.testing.assert_close(last.chained, first.chained)
    truth = study.mixture.marginal(first.sigma)
    second_moment = float(truth.weights @ (truth.centres.square().sum(1) + 2 * truth.deviations.square()))
    assert float(last.alone.square().sum(1).mean()) == pytest.approx(second_moment, rel=0.02), "from exact x_s"
    assert float(first.alone.square().sum(1).mean()) == pytest.approx(2, rel=0.02), "from noise"
    monkeypatch.setattr(study, "_experts", lambda _: (plan, [lambda x, sigma: torch.ones_like(x)] * 2))
    moved = study.phase_ends(run, 3, 20_000)[-1].alone
    torch.testing.assert_close(moved, last.alone - first.sigma, msg="from s to 0 along the velocity")


def test_a_report_without_runs_says_what_to_do(command, tmp_path: Path) -> None:
    arguments, _ = command
    with pytest.raises(SystemExit, match=r"nothing to report: .* run the stage 'equal' first"):
        paper_claims.main([*arguments, "--stages", "report", "--lrs", "0.5"])


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (["--updates", "30"], "--updates is a multiple of 4"),
        (["--seeds", "0"], "argument --seeds: expected a whole number of at least 1"),
        (["--methods", "magic"], "invalid choice: 'magic'"),
        (["--lrs", "1e-3", "-1"], "--lrs are learning rates above 0, found 0.001 -1"),
        (["--lrs", "nan"], "found nan"),
        (
            ["--teacher", "clips", "--guidance_scale", "-2"],
            "expected a number of at least 1, found '-2'",
        ),
        (["--teacher", "mixture", "clips", "--guidance_scale", "3"], "the mixture has none"),
    ],
)
def test_options_that_cannot_be_are_refused(bad: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        paper_claims.parse(bad)
    assert named in capsys.readouterr().err


# --- the trainings ---------------------------------------------------------------------------------------------------


def trained(study: MixtureStudy, run: Run, settings: Settings = SHORT) -> Distilled:
    return distil(MixtureProblem(run.method, study.mixture, study.initial, settings), run, settings.recipe())


def test_equal_runs_give_equal_experts_and_other_seeds_do_not(study: MixtureStudy) -> None:
    first, again, other = (trained(study, Run(METHODS["phased_2x2"], 1e-3, seed, 8)) for seed in (0, 0, 1))
    for name in ("high_noise", "low_noise"):
        states = [distilled.experts[name] for distilled in (first, again, other)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        assert not any(torch.equal(states[0][key], states[2][key]) for key in states[0])


@pytest.mark.parametrize("key", list(METHODS))
def test_every_method_moves_every_expert_at_the_cost_the_library_states(key: str, study: MixtureStudy) -> None:
    """Updates are shared equally by the phases; evaluations on average over SGTS steps."""
    method = METHODS[key]
    done = trained(study, Run(method, 1e-2, 0, 80))
    plan = SHORT.plan(method)
    assert len(done.experts) == len(plan)
    for expert in done.experts.values():
        pairs = zip(expert.values(), study.initial.state_dict().values(), strict=True)
        assert all(float((own - initial).abs().max()) > 1e-4 for own, initial in pairs)
    per_phase = [
        evaluations_per_update(plan, phase, SHORT.objective(method), SHORT.fake_updates, 1)
        for phase in range(len(plan))
    ]
    expected = sum(sum(costs.values()) for costs in per_phase) / len(plan) * 80
    assert sum(done.evaluations.values()) == pytest.approx(expected, rel=0.03)
    assert done.evaluations["teacher"] == 80
    assert done.skipped == 0


def test_joint_training_takes_the_phases_in_turn(study: MixtureStudy) -> None:
    """The same cost as one after the other, other experts: the second phase starts from an untrained first."""
    sequential, joint = (trained(study, Run(METHODS[key], 1e-3, 0, 40)) for key in ("phased_2x2", "joint"))
    assert joint.evaluations["teacher"] == sequential.evaluations["teacher"]
    assert not torch.equal(joint.experts["low_noise"]["head.weight"], sequential.experts["low_noise"]["head.weight"])


def test_the_average_over_updates_becomes_the_expert(study: MixtureStudy) -> None:
    """A very slow average stays at the first update, which Adam makes as large as the learning rate; without one the
    expert is the last.
    """
    run = Run(METHODS["dmd_one_step"], 1e-2, 0, 20)
    moved = []
    for decay in (0.9999, 1e-9):
        done = trained(study, run, replace(SHORT, ema_decay=decay))
        moved.append(float((done.experts["all_noise"]["head.weight"] - study.initial.head.weight).abs().mean()))
    assert moved[0] == pytest.approx(1e-2, rel=0.02)
    assert moved[1] > 1.3 * moved[0]


@pytest.mark.parametrize(
    ("function", "turned"),
    [
        ("generator_direction", lambda *args, **named: -generator_direction(*args, **named)),
        ("fake_score_loss", lambda *args: -fake_score_loss(*args)),
    ],
)
def test_a_sign_turned_in_the_update_of_the_product_changes_the_rows(
    function: str, turned: Any, study: MixtureStudy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = Run(METHODS["dmd_one_step"], 1e-3, 0, 60)
    right = study.row(run)
    monkeypatch.setattr(f"pdmd_core.distillation.{function}", turned)
    wrong = MixtureStudy(tmp_path, study.settings, study.samples).row(run)
    assert right.score is not None and wrong.score is not None
    assert wrong.score > 2 * right.score


def test_ablations_differ_from_their_method_in_one_choice() -> None:
    for method in METHODS.values():
        if method.ablation_of:
            base = METHODS[method.ablation_of]
            assert method.steps == base.steps
            assert base.ablation_of is None
            assert (len(method.objective) + method.joint, dict(base.objective), base.joint) == (1, {}, False)
            default = Objective(guidance_scale=1.0)
            assert (SHORT.objective(method) == default) == method.joint


def test_bad_gradients_are_skipped_and_counted(study: MixtureStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = study.mixture.velocity

    def velocity(self, x, sigma):
        return broken(x, sigma) * float("nan")

    monkeypatch.setattr(type(study.mixture), "velocity", velocity)
    done = trained(study, Run(METHODS["dmd_one_step"], 1e-3, 0, 4))
    assert done.skipped == 4
    assert all(bool(p.isfinite().all()) for p in done.experts["all_noise"].values())


def test_other_settings_never_meet_these_results(tmp_path: Path) -> None:
    first, second, again = (MixtureStudy(tmp_path, Settings(shift=shift)) for shift in (1.0, 3.0, 1.0))
    assert first.folder == again.folder != second.folder
