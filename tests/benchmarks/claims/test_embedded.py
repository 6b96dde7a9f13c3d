"""The comparison on pictures and clips with tiny settings: the real teacher, real trainings of seconds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks import leaderboard, paper_claims
from benchmarks.claims.common.distilling import Distilled, distil
from benchmarks.claims.common.methods import METHODS, Run
from benchmarks.claims.common.variants import VARIANTS
from benchmarks.claims.embedded import study as embedded_study
from benchmarks.claims.embedded.board import EmbeddedBoard
from benchmarks.claims.embedded.gallery import Gallery
from benchmarks.claims.embedded.measures import Measures, Scene, all_scenes, measured_scenes
from benchmarks.claims.embedded.study import SETTINGS, AskedScenes, EmbeddedStudy, Measuring
from benchmarks.claims.embedded.training import MODELS, EmbeddedProblem, digest_of, own_fake
from pdmd_core.evaluations import evaluations_per_update
from pdmd_core.experts import PhasedExperts
from pdmd_core.roles import FAKE
from tests.helpers.debian import installed
from training.embedded.emoji import FONT, all_captions, load_sprites

SCENES = {"pictures": tuple(measured_scenes(clips=False)[:3]), "clips": tuple(measured_scenes(clips=True)[:3])}


@pytest.fixture(scope="module", autouse=True)
def emoji() -> None:
    """Real scenes are drawn with the artwork."""
    installed("fonts-noto-color-emoji", FONT)


def make(work_dir: Path, teacher: str, seeds: int = 2, batch_size: int = 2) -> EmbeddedStudy:
    """A tiny study."""
    base = SETTINGS[teacher]
    settings = replace(base, recipe=replace(base.recipe, batch_size=batch_size))
    return EmbeddedStudy(work_dir, teacher, settings, Measuring(SCENES[teacher], seeds, teacher_steps=2, resamples=2))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> EmbeddedStudy:
    return make(tmp_path_factory.mktemp("pictures"), "pictures")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Runs paper_claims.py on a study; the folder that it wrote."""

    def run(study: EmbeddedStudy, options: str) -> Path:
        monkeypatch.setattr(paper_claims, "make_study", lambda teacher, options: study)
        arguments = ["--teacher", study.teacher, *options.split(), "--output_dir", str(tmp_path / "evidence")]
        paper_claims.main(arguments)
        return tmp_path / "evidence"

    return run


def test_all_stages_on_pictures(pictures: EmbeddedStudy, command: Callable[..., Path]) -> None:
    """The grid with one seed, the best learning rate with the other, twice the updates for the methods alone."""
    options = "--methods phased_2x2 biased --seeds 2 --lrs 1e-3 1e-2 --updates 4"
    pictures.longer = (2,)
    folder = command(pictures, options)
    rows = sorted(path.stem for path in (pictures.measured / "rows").glob("*.json"))
    trained = [name.split("-") for name in rows if "-lr-" in name]
    counts = {}
    for key in ("phased_2x2", "biased"):
        for updates in ("4", "8"):
            own = [parts for parts in trained if parts[0] == key and parts[4] == updates]
            counts[key, updates] = (sum(p[-1] == "0" for p in own), sum(p[-1] == "1" for p in own))
    data = json.loads((folder / "paper_claims.json").read_text("utf-8"))
    (best,) = {row["lr"] for row in data["rows"] if (row["method"], row["updates"]) == ("phased_2x2", 4)}
    assert counts == {
        ("phased_2x2", "4"): (2, 1),
        ("phased_2x2", "8"): (2 if best == 1e-2 else 1, 1),  # the best learning rate and the next lower one
        ("biased", "4"): (2, 1),
        ("biased", "8"): (0, 0),
    }
    assert {row["method"] for row in data["rows"]} == {"teacher_2", "teacher_4", "data", "phased_2x2", "biased"}
    for row in data["rows"]:
        assert row["teacher"] == "pictures"
        assert row["motion"] is None
        assert row["frechet"] == row["score"] >= 0
        assert 0 < row["diversity"] < 1
        assert row["network_evaluations"] == {"teacher_4": 8, "data": 0}.get(row["method"], 4)
        assert (row.get("processor_seconds", 0) > 0) == (row["lr"] is not None)
    grid = {(cell["method"], cell["updates"], cell["lr"]): cell["seeds"] for cell in data["grid"]}
    assert sorted(count for (key, n, _), count in grid.items() if (key, n) == ("biased", 4)) == [1, 2]
    assert data["settings"]["pictures"]["updates"] == 4
    assert {entry["budget"] for entry in data["verdict"]} == {"equal", "longest"}
    text = (folder / "pictures.md").read_text("utf-8")
    assert "Every row of one seed is 6 samples, 2 of each of 3 prompts" in text
    assert text.count("| 2 x 2, biased target |") == 2  # not trained for longer
    assert text.count("| Phased DMD, 2 x 2 with SGTS |") == 3
    for name in ("pictures_methods.png", "pictures_ablations.png", "pictures_runs.png"):
        assert f"({name})" in text
        assert (folder / name).stat().st_size > 5_000


def test_nothing_is_trained_or_sampled_again(
    pictures: EmbeddedStudy, command: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even from another place, by another process."""
    run = Run(METHODS["phased_2x2"], 1e-3, 0, 4)
    pictures.prepare()
    before = pictures.row(run)
    moved = make(tmp_path / "moved", "pictures")
    assert moved.folder.name == pictures.folder.name
    shutil.copytree(pictures.folder, moved.folder, dirs_exist_ok=True)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("again")

    monkeypatch.setattr(embedded_study, "distil", refuse)
    monkeypatch.setattr(Measures, "look", refuse)
    assert moved.has_row(run)
    assert moved.row(run) == before
    assert torch.equal(moved.reference.style, pictures.reference.style)
    with pytest.raises(AssertionError, match="again"):
        moved.row(replace(run, seed=7))


def test_more_samples_measure_again_what_is_trained(pictures: EmbeddedStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(METHODS["phased_2x2"], 1e-3, 0, 4)
    pictures.train(run)
    more = make(pictures.folder.parent, "pictures", seeds=3)
    assert more.folder == pictures.folder
    assert more.measured != pictures.measured
    monkeypatch.setattr(embedded_study, "distil", None)
    assert not more.has_row(run)
    assert more.row(run).frechet > 0
    assert make(pictures.folder.parent, "pictures", batch_size=3).folder != pictures.folder


def test_a_cut_off_training_leaves_nothing_half_done(
    tmp_path: Path, pictures: EmbeddedStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make(tmp_path, "pictures")
    study.__dict__["sampler"] = pictures.sampler
    run = Run(METHODS["dmd_one_step"], 1e-3, 0, 1)
    with monkeypatch.context() as patch:
        patch.setattr(embedded_study, "write_tensors", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            study.train(run)
    assert not study.has_row(run)
    assert load_file(study.train(run))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> EmbeddedStudy:
    return make(tmp_path_factory.mktemp("clips"), "clips")


def test_clips_have_motion_and_moving_pictures(clips: EmbeddedStudy, command: Callable[..., Path]) -> None:
    folder = command(clips, "--methods phased_2x2 --seeds 1 --lrs 1e-3 --updates 4 --stages prepare equal report")
    rows = {row["method"]: row for row in json.loads((folder / "paper_claims.json").read_text("utf-8"))["rows"]}
    for row in rows.values():
        assert 0.1 < row["motion_low"] <= row["motion"] <= row["motion_high"] < 5
        assert 0 <= row["dynamic_degree"] <= 1
        assert 0.8 < row["smoothness"] < 1
    assert rows["data"]["moves_as_said"] == rows["data"]["agreement"] == rows["data"]["dynamic_degree"] == 1
    with Image.open(folder / "clips_methods.gif") as animation:
        assert animation.n_frames == 9
    assert (folder / "clips_methods.png").stat().st_size > 5_000
    text = (folder / "clips.md").read_text("utf-8")
    assert "flow, % of teacher" in text
    assert "(clips_methods.gif)" in text


# --- trainings -------------------------------------------------------------------------------------------------------


def trained(study: EmbeddedStudy, run: Run) -> Distilled:
    return distil(EmbeddedProblem(run, study.sampler, study.settings), run, study.settings.recipe)


@pytest.mark.parametrize("name", ["pictures", "clips"])
def test_variants_are_shown_beside_the_teacher(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = EmbeddedBoard(tmp_path, name)
    monkeypatch.setattr(board, "study", request.getfixturevalue(name))
    assert board.shown() == []  # nothing was trained
    run = Run(METHODS["phased_2x2"], 1e-3, 0, 4)
    row = board.study.row(run)
    monkeypatch.setattr(board, "reported", lambda method, share=1.0: [row] if method is run.method else [])
    monkeypatch.setattr(board, "references", list)
    shown = board.shown()
    assert [made for _, made in shown] == [2, 4, run]
    leaderboard.write_samples([board], tmp_path)
    for line in leaderboard.report([board], samples=True).splitlines():
        if line.startswith("!["):
            assert "filmstrips" in line or run.method.title in line
            assert (tmp_path / line.rsplit("(", 1)[1].rstrip(")")).is_file()
    assert "![" not in leaderboard.report([board])
    gallery = Gallery(board.study)
    (_, first), (_, last) = gallery.samples([shown[0], shown[2]])
    picture = gallery.frame([("a", first), ("b", last)], 0)
    assert (first - last).abs().max() > 0.01 and picture.width > gallery.frame([("a", first)], 0).width


@pytest.mark.parametrize("key", ["dmd_sgts", "phased_4x1", "phased_2x2", "joint", "2x2_step"])
def test_every_expert_moves_at_the_cost_the_library_states(key: str, pictures: EmbeddedStudy) -> None:
    method, settings = (METHODS | VARIANTS)[key], pictures.settings
    updates = 4
    done = trained(pictures, Run(method, 1e-3, 0, updates))
    plan = settings.plan(method)
    assert list(done.experts) == [phase.name for phase in plan.phases]
    for expert in done.experts.values():
        assert all(float(value.abs().max()) > 0 for name, value in expert.items() if name.endswith("lora_B"))
    recipe = settings.recipe
    costs = [
        evaluations_per_update(plan, k, settings.objective(method), recipe.fake_updates, recipe.draws_per_rollout)
        for k in range(len(plan))
    ]
    share = updates // len(plan)
    assert done.evaluations["teacher"] == 2 * updates  # guidance: twice the batch
    of_fakes = sum(count for role, count in done.evaluations.items() if role.startswith(FAKE))
    assert of_fakes == sum(cost["fake"] + cost["fake_score"] for cost in costs) * share
    assert ("fake_2" in done.evaluations) == (key == "2x2_step")
    assert done.skipped == 0


def test_equal_runs_are_equal_and_joint_ones_differ(pictures: EmbeddedStudy) -> None:
    def weights(key: str, seed: int) -> dict[str, torch.Tensor]:
        done = trained(pictures, Run(METHODS[key], 1e-3, seed, 4))
        return {f"{name}/{k}": value for name, own in done.experts.items() for k, value in own.items()}

    chosen = [("phased_2x2", 0), ("phased_2x2", 0), ("phased_2x2", 1), ("joint", 0)]
    first, again, other, joint = (weights(*run) for run in chosen)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for changed in (other, joint):
        assert any(not torch.equal(first[name], changed[name]) for name in first if name.startswith("low_noise"))


def test_shipped_experts_teach_without_guidance_what_begins_as_them(pictures: EmbeddedStudy) -> None:
    method = VARIANTS["2x1_of_experts"]
    problem = EmbeddedProblem(Run(method, 1e-3, 0, 2), pictures.sampler, pictures.settings)
    shipped = PhasedExperts.open(MODELS / "experts")
    for name in ("high_noise", "low_noise"):
        assert all(torch.equal(v, problem.roles.state_dict(name)[k]) for k, v in shipped.lora_state(name).items())
    batch = problem.draw(2, torch.Generator().manual_seed(0))
    ask = (batch.noise, torch.tensor([0.9, 0.3]), batch.conditioning)
    taught = problem.roles.velocity("teacher", *ask)
    for i, name in enumerate(("high_noise", "low_noise")):
        torch.testing.assert_close(taught[i], problem.roles.velocity(name, *ask)[i], atol=1e-5, rtol=1e-4)
    assert problem.objective.guidance_scale == 1
    assert distil(problem, Run(method, 1e-3, 0, 2), pictures.settings.recipe).evaluations["teacher"] == 2


def test_a_phase_trains_its_expert_and_its_fake_alone(pictures: EmbeddedStudy) -> None:
    problem = EmbeddedProblem(Run(METHODS["phased_2x2"], 1e-3, 0, 4), pictures.sampler, pictures.settings)
    for phase, name in enumerate(("high_noise", "low_noise")):
        networks = problem.networks(phase)
        networks.set_trainable([name, FAKE])
        trainable = {role for role in problem.roles.specs if problem.roles.parameters(role)[0].requires_grad}
        assert trainable == {name, own_fake(FAKE, name)}
        networks.set_trainable([])


# --- scenes and measures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clips", [False, True])
def test_measured_scenes_are_balanced_captions_of_the_vocabulary(clips: bool) -> None:
    assert [scene.caption for scene in all_scenes(clips)] == all_captions(clips)
    scenes = measured_scenes(clips)
    assert len({scene.caption for scene in scenes}) == 48
    assert {scene.caption for scene in scenes} <= set(all_captions(clips))
    for column, least, most in (("emoji", 2, 2), ("background", 6, 6), ("motion", 6, 7)):
        values = [getattr(scene, column) for scene in scenes]
        if column != "motion" or clips:
            assert {least, most} >= {values.count(value) for value in values}


def test_asked_scenes_show_what_was_asked_and_vary_the_rest() -> None:
    scene = Scene("panda", "blue", "moves left")
    drawn = AskedScenes([scene, scene], seed=3).clips(2)
    assert drawn.captions == ["a panda moves left on a blue background"] * 2
    assert not torch.equal(drawn.pixels[0], drawn.pixels[1])


def test_without_the_font_a_study_ends_before_it_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.embedded.emoji.load_sprites", lambda font: load_sprites(tmp_path / "none.ttf"))
    monkeypatch.setattr(EmbeddedStudy, "teacher_samples", lambda *_: pytest.fail("sampled"))
    with pytest.raises(SystemExit, match=r"^emoji font not found at .*: install the Debian package fonts-noto"):
        make(tmp_path, "pictures").prepare()


def test_known_places_and_ways() -> None:
    """A white square on blue that moves 8 pixels to the left, two seeds 20 pixels apart vertically."""
    clips = torch.tensor([50, 90, 200]).view(1, 1, 3, 1, 1).expand(4, 2, 3, 64, 64) / 255
    clips = clips.clone()
    for sample, (x, y) in enumerate([(30, 10), (30, 30), (40, 20), (40, 20)]):
        for frame in range(2):
            left = x - 8 * frame
            clips[sample, frame, :, y : y + 8, left : left + 8] = 1.0
    measures = Measures([Scene("panda", "blue", "moves left"), Scene("fox", "blue", "moves right")], seeds=2)
    assert measures._as_said(clips) == 0.5
    assert Measures([Scene("panda", "blue", "moves left")] * 2, seeds=2)._as_said(clips) == 1
    # about its mean the first scene's two seeds are 10 pixels off, the second's none: (2 * 100 / 1 + 0) / 2 = 100
    assert measures._place_spread(clips) == pytest.approx(10, rel=1e-3)
    still = Measures([Scene("panda", "blue", "spins")] * 2, seeds=2)
    assert still._as_said(clips) is None


def test_broken_samples_are_measured_not_refused(pictures: EmbeddedStudy) -> None:
    latents = torch.full((6, *pictures.sampler.shape), float("nan"))
    pixels = pictures.decode(latents)
    assert bool(pixels.isfinite().all())
    assert pictures.measures.look(pixels).diversity == 0


@pytest.mark.parametrize(("name", "count"), [("pictures", 2), ("clips", 9)])
def test_decoding_is_what_the_autoencoder_does(name: str, count: int, request: pytest.FixtureRequest) -> None:
    """Single frames by flat convolutions, clips in parts."""
    study = request.getfixturevalue(name)
    latents = torch.randn(count, *study.sampler.shape, generator=torch.Generator().manual_seed(0))
    found, wanted = study.decode(latents), study.sampler.decode(latents)
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted, atol=1e-4)


def test_the_teacher_is_its_contents(tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "x.json", tmp_path / "b" / "x.json"
    for path, text in ((first, "1"), (second, "1")):
        path.parent.mkdir()
        path.write_text(text)
    assert digest_of([first]) == digest_of([second])
    second.write_text("2")
    assert digest_of([first]) != digest_of([second])


def test_the_command_makes_the_study_that_was_asked_for(tmp_path: Path) -> None:
    def study(*arguments: str):
        options = paper_claims.parse(["--work_dir", str(tmp_path), *arguments])
        return paper_claims.make_study(options.teacher[0], options)

    pictures, guided, clips = (
        study("--teacher", *rest) for rest in (["pictures"], ["pictures", "--guidance_scale", "3"], ["clips"])
    )
    assert (pictures.settings.frames, clips.settings.frames) == (1, 9)
    assert guided.settings == replace(pictures.settings, guidance_scale=3.0)
    assert len({pictures.folder, guided.folder, clips.folder}) == 3
    assert study("--teacher", "mixture").teacher == "mixture"
    assert paper_claims.parse([]).teacher == ["mixture", "pictures", "clips"]
