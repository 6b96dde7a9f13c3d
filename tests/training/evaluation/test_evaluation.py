"""Evaluation: what is kept and used again, what happens after a kill, that numbers are right where they are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from pdmd_core.experts import ExpertsError, PhasedExperts
from tests.helpers.tiny import save_wan_pipeline
from tests.helpers.tiny_experts import save_experts
from training.config.command_line import UserError
from training.data.buckets import SampleSize
from training.data.examples import Example
from training.data.teacher import TeacherSource
from training.evaluation.evaluation import Evaluation, Machine
from training.evaluation.measures import Pixels
from training.evaluation.methods import Method, Teacher
from training.evaluation.sampler import Sampler

PROMPTS = ("a panda", "a fox", "an apple")


class Brightness:
    """A measure that counts how often it looks."""

    identity = "1"

    def __init__(self, name: str) -> None:
        self.name, self.seen = name, 0

    def __call__(self, pixels: Pixels) -> dict[str, Tensor]:
        self.seen += len(pixels.all)
        return {"mean": pixels.all.flatten(1).mean(1)}


@pytest.fixture(scope="module")
def experts(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_experts(tmp_path_factory.mktemp("evaluation") / "experts", teacher, (16, 16, 1))


@pytest.fixture
def evaluation(teacher: Path, tmp_path: Path) -> Callable[..., Evaluation]:
    def make(seeds: int = 2, prompts: tuple[str, ...] = PROMPTS, cache: str = "cache", **changes: Any) -> Evaluation:
        source = TeacherSource(str(teacher))
        settings = Teacher(source, **{"shift": 3.0, "guidance_scale": 2.0} | changes)
        size = SampleSize(16, 16, 1, 12)
        machine = Machine("cpu", batch=2)
        return Evaluation(settings, size, [Example(p) for p in prompts], seeds, tmp_path / cache, machine)

    return make


def latents(evaluation: Evaluation, method: Method) -> Tensor:
    return evaluation._latents(method).rows(evaluation.ids(method), ["latents"])["latents"]


def no_sampling() -> Any:
    return mock.patch("training.evaluation.evaluation.Sampler", side_effect=AssertionError("sampled again"))


FEW = Method("teacher, 2 steps", steps=2)


def test_samples_are_those_of_the_sampler_prompt_by_prompt(
    evaluation: Callable[..., Evaluation], experts: Path, teacher: Path, tmp_path: Path
) -> None:
    made, own = evaluation(), PhasedExperts.open(experts)
    method = Method("experts", own)
    made.sample([FEW, method])
    pairs = [(prompt, seed) for prompt in range(3) for seed in range(2)]
    sampler = Sampler(str(teacher), SampleSize(16, 16, 1, 12), PROMPTS, tmp_path / "other", own, device="cpu")
    torch.testing.assert_close(latents(made, method), sampler.with_experts(pairs, None))
    torch.testing.assert_close(latents(made, FEW), sampler.with_teacher(pairs, 2, 3.0, 2.0, None))
    assert (made.network_evaluations(method), made.network_evaluations(FEW)) == (2, 4)
    assert evaluation(guidance_scale=1.0).network_evaluations(FEW) == 2
    assert made.seconds(FEW) > 0


def test_what_is_there_is_not_sampled_again_and_more_seeds_and_prompts_only_cost_what_is_new(
    evaluation: Callable[..., Evaluation],
) -> None:
    evaluation().sample([FEW])
    before = latents(evaluation(), FEW)
    with no_sampling():
        evaluation().sample([FEW])
        evaluation(seeds=1, prompts=PROMPTS[::-1]).sample([FEW])
    drawn: list[tuple[int, int]] = []
    original = Sampler.with_teacher

    def with_teacher(self: Sampler, pairs: Any, *rest: Any) -> Tensor:
        drawn.extend(pairs)
        return original(self, pairs, *rest)

    with mock.patch.object(Sampler, "with_teacher", with_teacher):
        evaluation(seeds=3, prompts=(*PROMPTS, "a rocket")).sample([FEW])
    assert sorted(drawn) == [(0, 2), (1, 2), (2, 2), (3, 0), (3, 1), (3, 2)]
    assert torch.equal(latents(evaluation(), FEW), before)


@pytest.mark.parametrize(
    "changes", [{"guidance_scale": 3.0}, {"shift": 4.0}, {"negative_prompt": "blurry"}], ids=lambda c: next(iter(c))
)
def test_what_changes_the_teacher_s_samples_does_not_use_old_ones(
    changes: dict[str, Any], evaluation: Callable[..., Evaluation]
) -> None:
    evaluation().sample([FEW])
    before, other = latents(evaluation(), FEW), evaluation(**changes)
    other.sample([FEW])
    assert (latents(other, FEW) - before).abs().max() > 1e-4
    with no_sampling(), pytest.raises(AssertionError):
        evaluation().sample([Method("more steps", steps=3)])


def test_other_experts_and_another_dtype_do_not_use_old_samples(
    evaluation: Callable[..., Evaluation], experts: Path, teacher: Path, tmp_path: Path
) -> None:
    other = save_experts(tmp_path / "other", teacher, (16, 16, 1), seed=1)
    methods = [Method(name, PhasedExperts.open(folder)) for name, folder in (("a", experts), ("b", other))]
    made = evaluation()
    made.sample(methods)
    assert (latents(made, methods[0]) - latents(made, methods[1])).abs().max() > 1e-3
    half = evaluation()
    half.machine = Machine("cpu", dtype=torch.bfloat16)
    half.sample(methods[:1])
    difference = (latents(half, methods[0]) - latents(made, methods[0])).abs().max()
    assert 0 < difference < 0.5


def test_a_kill_loses_the_batch_in_progress_and_the_rest_is_the_same(evaluation: Callable[..., Evaluation]) -> None:
    whole = evaluation(cache="whole")
    whole.sample([FEW])
    original, batches = Sampler.with_teacher, []

    def killed(self: Sampler, pairs: Any, *rest: Any) -> Tensor:
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(pairs)
        return original(self, pairs, *rest)

    with mock.patch.object(Sampler, "with_teacher", killed), pytest.raises(KeyboardInterrupt):
        evaluation().sample([FEW])
    assert len(evaluation()._latents(FEW).missing(evaluation().ids(FEW))) == 2
    evaluation().sample([FEW])
    assert torch.equal(latents(evaluation(), FEW), latents(whole, FEW))


def test_a_damaged_file_is_made_again(
    evaluation: Callable[..., Evaluation], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation().sample([FEW])
    before = latents(evaluation(), FEW)
    path = next(evaluation()._latents(FEW).folder.iterdir())
    data = bytearray(path.read_bytes())
    data[-1] ^= 64
    path.write_bytes(data)
    again = evaluation()
    again.sample([FEW])
    assert torch.equal(latents(again, FEW), before)
    assert str(path) in capsys.readouterr().err


def test_a_measure_looks_once_and_a_new_one_needs_no_sampling(evaluation: Callable[..., Evaluation]) -> None:
    made, first, second = evaluation(), Brightness("brightness"), Brightness("light")
    made.sample([FEW])
    rows = made.measure(FEW, [first])["brightness"]["mean"]
    assert rows.shape == (6,) and first.seen == 6
    again = evaluation()
    with (
        no_sampling(),
        mock.patch("training.evaluation.evaluation.Decoder", side_effect=AssertionError("decoded again")),
    ):
        again.sample([FEW])
        assert torch.equal(again.measure(FEW, [first])["brightness"]["mean"], rows)
    with no_sampling():
        assert torch.equal(evaluation().measure(FEW, [first, second])["light"]["mean"], rows)
    assert (first.seen, second.seen) == (6, 6)
    first.identity = "2"
    evaluation().measure(FEW, [first])
    assert first.seen == 12, "another network of the same name looks itself"


def test_experts_of_another_teacher_are_refused_before_the_teacher_samples(
    evaluation: Callable[..., Evaluation], tmp_path: Path
) -> None:
    from tests.helpers.tiny import transformer, wan_pipeline

    pipeline = wan_pipeline()
    pipeline.register_modules(transformer=transformer(ffn_dim=48))
    pipeline.save_pretrained(tmp_path / "wider")
    wrong = save_experts(tmp_path / "wrong", tmp_path / "wider", (16, 16, 1))
    forbidden = mock.patch.object(Sampler, "with_teacher", side_effect=AssertionError("sampled first"))
    with forbidden, pytest.raises(ExpertsError, match="does not fit the base") as caught:
        evaluation().sample([FEW, Method("wrong", PhasedExperts.open(wrong))])
    assert len(str(caught.value).splitlines()) == 1


def test_samples_that_are_not_finite_are_refused_and_not_kept(evaluation: Callable[..., Evaluation]) -> None:
    broken = mock.patch.object(Sampler, "with_teacher", return_value=torch.full((2, 16, 1, 2, 2), torch.nan))
    with broken, pytest.raises(UserError, match="seed 0 of 'a panda' has values that are not finite"):
        evaluation().sample([FEW])
    assert len(evaluation()._latents(FEW).missing(evaluation().ids(FEW))) == 6


def test_a_device_without_memory_is_one_line(evaluation: Callable[..., Evaluation]) -> None:
    full = mock.patch.object(Sampler, "with_teacher", side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    with full, pytest.raises(UserError, match="--dtype bfloat16, --batch_size"):
        evaluation().sample([FEW])


def test_prompts_that_are_there_twice_count_once(teacher: Path, tmp_path: Path) -> None:
    settings, size = Teacher(TeacherSource(str(teacher)), 3.0, 1.0), SampleSize(16, 16, 1, 12)
    made = Evaluation(settings, size, [Example("x"), Example("y"), Example("x")], 2, tmp_path)
    assert len(made.ids(FEW)) == len(set(made.ids(FEW))) == 4
    with pytest.raises(UserError, match="at least 1 sample"):
        Evaluation(settings, size, [Example("x")], 0, tmp_path)


def test_a_changed_teacher_in_the_same_place_is_another_one(tmp_path: Path) -> None:
    place, size = tmp_path / "teacher", SampleSize(16, 16, 1, 12)
    found = []
    for changed in (False, True):
        save_wan_pipeline(place)
        if changed:
            file = next((place / "transformer").glob("*.safetensors"))
            data = bytearray(file.read_bytes())
            data[-2] ^= 1
            file.write_bytes(data)
        made = Evaluation(Teacher(TeacherSource(str(place)), 3.0, 1.0), size, [Example("x")], 1, tmp_path / "cache")
        found.append(made._folder(FEW))
    assert found[0] != found[1]
