"""What users of diffusers expect of objects: ``push_to_hub``, and the arguments that say where on the Hub."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from pdmd_core.experts import MANIFEST_NAME, read_manifest
from tests.helpers.families.cases import CASES
from tests.helpers.hub import READER, WRITER, Hub
from tests.helpers.hub_client import Client
from tests.helpers.pushed_experts import FILES, done, refusal
from tests.helpers.tiny_pipelines import PLAN, lora_experts, lora_file, random_lora

CASE = "from tests.helpers.families.cases import CASES\nfrom pdmd_core import *\ncase = CASES['wan']\n"


def test_experts_push_themselves(hub: Hub, client: Client, folder: Path, repo: str) -> None:
    call = f"push_to_hub({repo!r}, commit_message='Mine', revision='trial')"
    code = f"from pdmd_core import PhasedExperts\nresult = PhasedExperts.from_pretrained({str(folder)!r}).{call}"
    assert done(client.run(code)) == f"{hub.url}/{repo}/tree/trial"
    assert hub.repositories[repo].messages == ["initial commit", "Mine"]
    assert set(hub.files(repo, "trial")) == {*FILES, ".gitattributes", "README.md"}


def test_what_is_pushed_is_the_object_and_not_the_folder_it_came_from(
    hub: Hub, client: Client, folder: Path, repo: str, tmp_path: Path
) -> None:
    """Here experts of other strength, and released files of one name in folders of their own."""
    for k, name in enumerate(("high", "low")):
        network = CASES["wan"].build().transformer
        (tmp_path / name).mkdir()
        save_file(lora_file(network, random_lora(network, 4, seed=k), 4.0), tmp_path / name / "lora.safetensors")
    code = (
        "from dataclasses import replace\nfrom pdmd_core import PhasedExperts, PhasePlan\n"
        f"e = PhasedExperts.from_pretrained({str(folder)!r})\nm = e.manifest\n"
        "m = replace(m, experts=tuple(replace(x, strength=0.5) for x in m.experts))\n"
        f"replace(e, manifest=m).push_to_hub({repo!r}, private=True)\n"
        f"files = {{name: f'{tmp_path}/{{name}}/lora.safetensors' for name in ('high', 'low')}}\n"
        f"PhasedExperts.from_lora_files(m.plan, base='tiny/base', **files).push_to_hub({repo + '-files'!r})\n"
        f"result = [[x.strength for x in PhasedExperts.from_pretrained({repo!r}).manifest.experts],"
        f" [x.name for x in PhasedExperts.from_pretrained({repo + '-files'!r}).manifest.experts]]"
    )
    outcome = client.run(code)
    assert outcome.error is None and outcome.result == [[0.5, 0.5], ["high_noise", "low_noise"]], outcome
    assert hub.repositories[repo].private and not hub.repositories[f"{repo}-files"].private
    assert set(hub.files(f"{repo}-files")) == {*FILES, ".gitattributes", "README.md"}
    assert read_manifest(folder).experts[0].strength == 1.0


def test_experts_are_attached_from_a_branch_a_folder_and_with_a_token(
    hub: Hub, client: Client, anonymous: Client, repo: str, tmp_path: Path
) -> None:
    written = lora_experts(tmp_path / "experts", CASES["wan"].build(), PLAN)
    inside = {f"a/b/{path.name}": path.read_bytes() for path in written.iterdir()}
    commit = hub.put(repo, inside)
    hub.repositories[repo].branches["trial"] = commit
    hub.put(repo, {"README.md": b"emptied"})
    hub.repositories[repo].private = True
    where = f"subfolder='a/b', cache_dir={str(tmp_path / 'cache')!r}, token={WRITER!r}"
    attach = f"{CASE}pipe = attach_experts(case.build(), {repo!r}, {{}})\nresult = str(pipe.phased.experts.folder)"
    found = Path(done(anonymous.run(attach.format(f"{where}, revision='trial'"))))
    assert found.is_relative_to(tmp_path / "cache") and (found / MANIFEST_NAME).is_file()
    assert done(anonymous.run(attach.format(f"{where}, revision='trial', local_files_only=True"))) == str(found)
    refusal(anonymous.run(attach.format(where)), f"holds no {MANIFEST_NAME} in a/b")
    refusal(anonymous.run(attach.format(where.replace(WRITER, READER))), "private")


def test_a_pipeline_that_is_pushed_is_loaded_by_its_id(hub: Hub, client: Client, repo: str, tmp_path: Path) -> None:
    """With the base that was pushed, and the scheduler of each, whichever way it was pushed."""
    for kind in ("lora", "full"):
        own = f"{repo}-{kind}"
        code = (
            f"{CASE}from tests.helpers.tiny_pipelines import KINDS, PLAN\nfrom pathlib import Path\nimport torch\n"
            f"pipe = case.build()\nattach_experts(pipe, KINDS[{kind!r}](Path({str(tmp_path / kind)!r}), pipe, PLAN))\n"
            "pipe.scheduler = PhasedDMDScheduler.from_plan(PLAN, sampler='renoise')\nexpected = case.sample(pipe)\n"
            f"pipe.push_to_hub({own!r})\n"
            f"pipe.save_pretrained({str(tmp_path / f'{kind}-saved')!r}, push_to_hub=True, repo_id={own + '-2'!r})\n"
            "from diffusers import DiffusionPipeline\nresult = []\n"
            f"for source in ({own!r}, {own + '-2'!r}):\n"
            "    again = load_phased_pipeline(source)\n    again.set_progress_bar_config(disable=True)\n"
            "    result.append(float((case.sample(again) - expected).abs().max()))\n"
            "    if again.phased.switches:\n        result.append(detach_experts(again).scheduler.config.shift)\n"
            f"stock = DiffusionPipeline.from_pretrained({own!r})\nstock.set_progress_bar_config(disable=True)\n"
            "call = {'num_inference_steps': 4, **case.unguided}\n"
            "if not pipe.phased.switches:\n"
            "    result.append(float((case.sample(stock, **call) - expected).abs().max()))\n"
        )
        outcome = client.run(code)
        assert outcome.error is None, outcome
        assert max(outcome.result[:: 2 if kind == "lora" else 1]) < 1e-5
        assert kind == "full" or outcome.result[1::2] == [CASES["wan"].build().scheduler.config.shift] * 2
        assert (
            hub.files(own)["scheduler/scheduler_config.json"]
            == hub.files(own + "-2")["scheduler/scheduler_config.json"]
        )
