"""The nodes, called as a graph calls them."""

from __future__ import annotations

import asyncio
import json
from dataclasses import fields
from typing import Any

import pytest
import torch

from pdmd_core.noise_level import shift_sigma
from tests.helpers.comfyui.phased_models import TWO, plan_of, sample, sigmas_of


def test_every_node_and_socket_says_what_it_is(our_nodes) -> None:
    from comfy_api.latest import io

    for name, kind in our_nodes.items():
        schema = kind.GET_SCHEMA()  # validates
        assert schema.display_name and schema.description and schema.category == "phased dmd", name
        assert {field.name for field in fields(io.Schema)}.isdisjoint({"search_aliases"}) or schema.search_aliases, name
        for socket in [*schema.inputs, *schema.outputs]:
            assert socket.tooltip, f"{name}.{socket.id}"


def test_plans_from_steps_sigmas_and_folders(pack, fails) -> None:
    assert plan_of(pack).to_dict() == TWO.to_dict()
    (plan,) = pack.call("PhasedDMDPlanFromSigmas", sigmas="1, 0.9375 | 5/6, 0.625", names="high_noise, low_noise")
    assert plan.to_dict() == TWO.to_dict()
    (named,) = pack.call("PhasedDMDPlanFromSigmas", sigmas="1 | 0.5", names="above, below")
    assert [phase.name for phase in named.phases] == ["above", "below"]
    (named,) = pack.call("PhasedDMDPlanFromSteps", steps="1,1,2", shift=5.0, names="first, high, low")
    assert [phase.name for phase in named.phases] == ["first", "high", "low"]
    fails("steps are whole numbers", "PhasedDMDPlanFromSteps", steps="2 2", shift=5.0, names="")
    fails("sigmas must descend", "PhasedDMDPlanFromSigmas", sigmas="1, 0.5 | 0.7", names="")
    fails("expected one name for each of the 2 phases", "PhasedDMDPlanFromSteps", steps="2, 2", shift=5.0, names="a")
    fails("no experts folder 'gone'", "PhasedDMDPlanFromExperts", experts="gone")


def test_presets_and_their_undistilled_steps(pack, fails) -> None:
    node = "PhasedDMDPlanFromPreset"
    (plan,) = pack.call(node, preset="wan2.2-lightx2v-4step", undistilled_steps=0, names="")
    assert plan.to_dict() == TWO.to_dict()
    (plan,) = pack.call(node, preset="wan2.2-lightx2v-4step", undistilled_steps=1, names="")
    assert plan.sigmas == TWO.sigmas and [len(phase.sigmas) for phase in plan.phases] == [1, 1, 2]
    assert [phase.name for phase in plan.phases] == ["undistilled", "high_noise", "low_noise"]
    (plan,) = pack.call(node, preset="wan2.2-lightx2v-4step", undistilled_steps=5, names="a, b, c")
    assert [len(phase.sigmas) for phase in plan.phases] == [5, 1, 2] and plan.sigmas[5:] == TWO.sigmas[1:]
    assert plan.phases[0].sigmas == pytest.approx([shift_sigma(1 - 0.05 * n, 5.0) for n in range(5)])
    (plan,) = pack.call(node, preset="ltx2-distilled", undistilled_steps=2, names="")
    assert [phase.name for phase in plan.phases] == ["undistilled", "all_noise"] and len(plan.sigmas) == 9
    fails("no preset 'none'", node, preset="none", undistilled_steps=0, names="")


def test_a_boundary_takes_any_steps_and_runs_as_two_samplers(pack, models, caplog) -> None:
    (plan,) = pack.call("PhasedDMDPlanFromBoundary", boundary="0.875", steps=10, shift="5", names="")
    experts = [models.wan(0), models.wan(1)]
    common = {"plan": plan, "cfg": "", "set_shift": True, "model_1": experts[0], "model_2": experts[1]}
    (model,) = pack.call("PhasedDMDExperts", **common)
    for steps in (10, 7):
        (simple,) = pack.call("BasicScheduler", model=model, scheduler="simple", steps=steps, denoise=1.0)
        (sigmas,) = pack.call("PhasedDMDSigmas", plan=plan, steps=steps, denoise=1.0)
        torch.testing.assert_close(simple, sigmas, atol=2e-3, rtol=0)
        found = sample(pack, models, model, "wan", sigmas)
        first = int((sigmas > 0.875).sum())
        high = sample(pack, models, experts[0], "wan", sigmas[: first + 1])
        (none,), (euler,) = pack.call("DisableNoise"), pack.call("KSamplerSelect", sampler_name="euler")
        prompts = {"positive": models.conditioning("wan"), "negative": models.conditioning("wan", seed=8)}
        (guider,) = pack.call("CFGGuider", model=experts[1], cfg=1.0, **prompts)
        rest = {"noise": none, "sampler": euler, "sigmas": sigmas[first:], "latent_image": {"samples": high}}
        expected = pack.call("SamplerCustomAdvanced", guider=guider, **rest)[0]["samples"]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not [r for r in caplog.records if "trained" in r.getMessage()]


def test_a_cfg_for_each_step(pack, models) -> None:
    plan, experts = plan_of(pack), [models.wan(0), models.wan(1)]
    common = {"plan": plan, "set_shift": True, "model_1": experts[0], "model_2": experts[1]}
    (model,) = pack.call("PhasedDMDExperts", cfg="4, 2 | 1", **common)
    fine = {"model_1": experts[0], "model_2": experts[0], "model_3": experts[1]}
    (expected,) = pack.call("PhasedDMDExperts", plan=plan_of(pack, "1, 1, 2"), cfg="4, 2, 1", set_shift=True, **fine)
    outputs = [sample(pack, models, each, "wan", sigmas_of(TWO), cfg=7.0) for each in (model, expected)]
    assert torch.equal(*outputs)
    (flat,) = pack.call("PhasedDMDExperts", cfg="4, 1", **common)
    assert (outputs[0] - sample(pack, models, flat, "wan", sigmas_of(TWO))).abs().max() > 1e-3


def test_sigmas_are_exact_refined_and_start_lower(pack) -> None:
    plan = plan_of(pack)
    (sigmas,) = pack.call("PhasedDMDSigmas", plan=plan, steps=0, denoise=1.0)
    assert torch.equal(sigmas, sigmas_of(TWO))
    (sigmas,) = pack.call("PhasedDMDSigmas", plan=plan, steps=6, denoise=1.0)
    assert torch.equal(sigmas, sigmas_of(TWO.refined(6)))
    (sigmas,) = pack.call("PhasedDMDSigmas", plan=plan, steps=0, denoise=0.5)
    assert torch.equal(sigmas, sigmas_of(TWO)[2:])
    assert pack.call("PhasedDMDSigmas", plan=plan, steps=0, denoise=0.0)[0].numel() == 0


def test_experts_from_models(pack, models, fails) -> None:
    plan, experts = plan_of(pack), [models.wan(0), models.wan(1)]
    common = {"plan": plan, "cfg": "", "set_shift": True}
    (model,) = pack.call("PhasedDMDExperts", model_1=experts[0], model_2=experts[1], **common)
    composite = pack.module("comfy_nodes.composite")
    expected = composite.compose(plan, [composite.Expert(expert) for expert in experts])
    outputs = [sample(pack, models, each, "wan", sigmas_of(TWO)) for each in (model, expected)]
    assert torch.equal(*outputs)
    fails("no MODEL is connected to model_2 (low_noise)", "PhasedDMDExperts", model_1=experts[0], **common)
    three = {f"model_{k}": experts[0] for k in (1, 2, 3)}
    fails("model_3 would never run", "PhasedDMDExperts", **three, **common)
    fails(
        "one number for each", "PhasedDMDExperts", model_1=experts[0], model_2=experts[1], **{**common, "cfg": "1,2,3"}
    )
    seven = plan_of(pack, "1, 1, 1, 1, 1, 1, 1")
    fails("up to 6 MODELs", "PhasedDMDExperts", model_1=experts[0], **{**common, "plan": seven})


def test_the_phased_sampler_equals_sampler_custom_advanced(pack, models, fails) -> None:
    plan = plan_of(pack)
    common = {"plan": plan, "cfg": "", "set_shift": True, "model_1": models.wan(0), "model_2": models.wan(1)}
    (model,) = pack.call("PhasedDMDExperts", **common)
    latent = {"samples": torch.randn(2, 16, 2, 4, 4), "noise_mask": torch.ones(1, 4, 4)}
    inputs = {"seed": 42, "steps": 0, "cfg": 1.0, "sampler_name": "euler", "latent_image": latent, "denoise": 1.0}
    inputs |= {"positive": models.conditioning("wan"), "negative": models.conditioning("wan", seed=8)}
    (found,) = pack.call("PhasedDMDSampler", model=model, **inputs)
    assert torch.equal(found["samples"], sample(pack, models, model, "wan", sigmas_of(TWO), latent=latent))
    (found,) = pack.call(
        "PhasedDMDSampler", model=model, **{**inputs, "steps": 7, "denoise": 0.5, "sampler_name": "heun"}
    )
    (sigmas,) = pack.call("PhasedDMDSigmas", plan=plan, steps=7, denoise=0.5)
    assert torch.equal(found["samples"], sample(pack, models, model, "wan", sigmas, "heun", latent=latent))
    (found,) = pack.call("PhasedDMDSampler", model=model, **{**inputs, "cfg": 3.0})
    assert torch.equal(found["samples"], sample(pack, models, model, "wan", sigmas_of(TWO), cfg=3.0, latent=latent))
    (found,) = pack.call("PhasedDMDSampler", model=model, **{**inputs, "denoise": 0.0})
    assert torch.equal(found["samples"], latent["samples"])
    fails("this MODEL carries no phased experts", "PhasedDMDSampler", model=models.wan(), **inputs)
    for changes in ({"steps": 3}, {"steps": 3, "denoise": 0.5, "sampler_name": "uni_pc"}):
        both = [
            pack.call(node, model=models.wan(), **{**inputs, **changes}, **more)[0]["samples"]
            for node, more in (("PhasedDMDSampler", {}), ("KSampler", {"scheduler": "simple"}))
        ]
        assert torch.equal(*both)
    fails("at least the 4 that the experts were trained for", "PhasedDMDSampler", model=model, **{**inputs, "steps": 2})


def test_a_sampler_for_each_phase(pack, models, fails) -> None:
    experts = [models.wan(0), models.wan(1)]
    common = {"plan": plan_of(pack), "cfg": "", "set_shift": True, "model_1": experts[0], "model_2": experts[1]}
    (model,) = pack.call("PhasedDMDExperts", **common)
    prompts = {"positive": models.conditioning("wan"), "negative": models.conditioning("wan", seed=8)}
    inputs = {"model": model, "seed": 42, "steps": 8, "cfg": 1.0, "sampler_name": "euler", "denoise": 1.0, **prompts}
    inputs["latent_image"] = models.latent("wan")
    (sigmas,) = pack.call("PhasedDMDSigmas", plan=common["plan"], steps=8, denoise=1.0)
    (none,), outputs = pack.call("DisableNoise"), []
    for names in (("heun", "dpmpp_2m"), ("euler", "euler")):
        (found,) = pack.call("PhasedDMDSampler", samplers=", ".join(names), **inputs)
        split = int((sigmas > 0.8334).sum())
        half = sample(pack, models, model, "wan", sigmas[: split + 1], names[0])
        (guider,) = pack.call("CFGGuider", model=model, cfg=1.0, **prompts)
        (choice,) = pack.call("KSamplerSelect", sampler_name=names[1])
        rest = {"noise": none, "sampler": choice, "sigmas": sigmas[split:], "latent_image": {"samples": half}}
        expected = pack.call("SamplerCustomAdvanced", guider=guider, **rest)[0]["samples"]
        torch.testing.assert_close(found["samples"], expected, atol=1e-5, rtol=1e-5)
        outputs.append(found["samples"])
    (usual,) = pack.call("PhasedDMDSampler", **inputs)
    assert torch.equal(usual["samples"], outputs[1])
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    fails(
        "samplers are one name for each of high_noise, low_noise",
        "PhasedDMDSampler",
        samplers="heun, euler, heun",
        **inputs,
    )
    (one,), (two,) = (pack.call("PhasedDMDSampler", samplers=each, **inputs) for each in ("heun", "heun\uff0cheun"))
    assert torch.equal(one["samples"], two["samples"])
    fails("found 'best'", "PhasedDMDSampler", samplers="heun, best", **inputs)


def test_the_report_warns_of_sigmas_that_were_not_trained(pack, models) -> None:
    plan = plan_of(pack)
    picture, text = pack.call("PhasedDMDPlanReport", plan=plan, sigmas=sigmas_of(TWO))
    assert picture.ndim == 4 and picture.shape[-1] == 3 and 0 <= picture.min() < picture.max() <= 1
    assert "Warning" not in text and text.count("low_noise  sigma") == 2
    (simple,) = pack.call("BasicScheduler", model=models.wan(), scheduler="beta", steps=4, denoise=1.0)
    _, text = pack.call("PhasedDMDPlanReport", plan=plan, sigmas=simple)
    assert text.startswith("Warning: not the trained sigmas: use scheduler simple with set_shift on, or Phased Sigmas")
    assert "was not trained to step" in text
    model_inputs = {"plan": plan, "cfg": "3.5, 1", "set_shift": True, "model_1": models.wan(), "model_2": models.wan()}
    (model,) = pack.call("PhasedDMDExperts", **model_inputs)
    _, text = pack.call("PhasedDMDPlanReport", model=model)
    assert "high_noise  sigma 1.0000  log-SNR -inf  cfg 3.5" in text
    _, text = pack.call("PhasedDMDPlanReport", model=model, plan=plan_of(pack, "1, 1, 2"))
    assert "Warning: connect the plan of the MODEL: its experts follow another one" in text
    assert pack.call("PhasedDMDPlanReport", model=models.wan(), plan=plan)[1].count("step ") == 4
    picture, text = pack.call("PhasedDMDPlanReport")
    assert text == "connect a plan, or the MODEL of Load Phased Experts or Phased Experts" and picture.ndim == 4
    _, text = pack.call("PhasedDMDPlanReport", model=models.wan())  # what a bypassed node lets through
    assert text.startswith("this MODEL carries no phased experts: connect a plan")
    report = pack.module("comfy_nodes.plan_nodes").PlanReport
    assert report.fingerprint_inputs() == "en"  # a cached report is not shown to readers of another language
    with pack.module("comfy_nodes.language").speaking("zh-TW", ""):
        assert report.fingerprint_inputs() == "zh"


def test_a_run_with_sigmas_that_were_not_trained_is_warned_of_once(pack, models, caplog) -> None:
    plan = plan_of(pack)
    common = {"plan": plan, "cfg": "", "set_shift": True, "model_1": models.wan(0), "model_2": models.wan(1)}
    (model,) = pack.call("PhasedDMDExperts", **common)

    def said(sigmas: torch.Tensor, sampler: str = "euler", network: Any = model) -> list[str]:
        caplog.clear()
        sample(pack, models, network, "wan", sigmas, sampler)
        return [record.getMessage() for record in caplog.records if "Phased experts" in record.getMessage()]

    (beta,) = pack.call("BasicScheduler", model=model, scheduler="beta", steps=4, denoise=1.0)
    (line,) = said(beta, "heun")
    assert "not the trained sigmas: use scheduler simple" in line and "expert high_noise was not trained to" in line
    (simple,) = pack.call("BasicScheduler", model=model, scheduler="simple", steps=20, denoise=1.0)
    (line,) = said(simple)
    assert "20 steps, trained for 4: use 4 and scheduler simple (0 on Phased Sampler)" in line
    assert "and 15 more" in line and "\n" not in line
    (gentle,) = pack.call("PhasedDMDSigmas", plan=plan, steps=0, denoise=0.1)
    (line,) = said(gentle)
    assert "take denoise 0.25 to start at a trained step: sigma 0.4167 lies between two" in line
    (skipped,) = said(sigmas_of(TWO)[[0, 1, 4]])
    assert "jumps over the boundary 0.8333" in skipped
    for sigmas in (sigmas_of(TWO), sigmas_of(TWO)[2:], sigmas_of(TWO)[:3]):
        assert said(sigmas) == []
    assert said(beta, network=models.wan(0)) == []


def test_the_front_ends_question_is_answered_by_the_same_code(pack) -> None:
    from aiohttp.test_utils import make_mocked_request

    extension = pack.module("comfy_nodes.extension")

    def ask(body: Any) -> Any:
        request = make_mocked_request("POST", extension.PLAN_ROUTE)

        async def read() -> Any:
            return body

        request.json = read
        response = asyncio.run(extension._plan(request))
        return response.status, json.loads(response.text)

    timeline = pack.module("comfy_nodes.timeline").timeline
    steps = {"node": "PhasedDMDPlanFromSteps", "inputs": {"steps": "2, 2", "shift": 5, "names": "", "x": 1}}
    assert ask(steps) == (200, timeline(plan_of(pack)))
    experts = {"node": "PhasedDMDExperts", "inputs": {"cfg": "3.5, -", "set_shift": True}, "from": {"plan": steps}}
    assert ask(experts) == (200, timeline(plan_of(pack), [3.5, None]))
    loras = {f"lora_{k}": "none" if k == 1 else "x" for k in range(1, 5)} | {f"strength_{k}": 0.5 for k in range(1, 5)}
    lora = {"node": "PhasedDMDExpertsLoRA", "inputs": {"cfg": "", **loras}, "from": {"plan": steps}}
    assert ask(lora) == (200, timeline(plan_of(pack), [None, None], strengths=[None, 0.5]))
    widgets = {"steps": 0, "denoise": 0.5, "cfg": 2.0}
    status, data = ask({"node": "PhasedDMDSampler", "inputs": widgets, "from": {"model": experts}})
    assert [(step["skipped"], step["cfg"]) for step in data["steps"]] == [(True, 3.5)] * 2 + [(False, 2.0)] * 2
    sigmas = {"node": "PhasedDMDSigmas", "inputs": {"steps": 6, "denoise": 1.0}, "from": {"plan": steps}}
    status, data = ask({"node": "PhasedDMDPlanReport", "inputs": {}, "from": {"model": experts, "sigmas": sigmas}})
    assert len(data["steps"]) == 6 and data["text"].startswith(
        "Warning: 6 steps, trained for 4: use 4 and scheduler simple"
    )
    gentle = {"node": "PhasedDMDSampler", "inputs": {**widgets, "denoise": 0.1}, "from": {"model": lora}}
    status, data = ask(gentle)
    assert data["note"] == "denoise 0.125 is between trained steps, 0.25 is at one"
    assert data["start"] == pytest.approx(0.125)
    assert [phase["strength"] for phase in data["phases"]] == [None, 0.5]
    status, data = ask({**gentle, "inputs": {**widgets, "cfg": 7.0}})
    assert data["note"] == "cfg 7 with few-step LoRAs: most of them want 1"
    status, data = ask({**gentle, "inputs": {**widgets, "steps": 2}})
    assert data["error"] == "steps are at least the 4 that the experts were trained for, or 0: found 2"
    lora["inputs"]["strengths"] = "1 | 1, 0.5"
    status, data = ask({**gentle, "locale": "zh", "client": ""})
    assert (
        data["note"]
        == "\u964d\u566a 0.125 \u5728\u8bad\u7ec3\u6b65\u4e4b\u95f4\uff0c0.25 \u5728\u8bad\u7ec3\u6b65\u4e0a"
    )
    assert [phase["strength"] for phase in data["phases"]] == [None, 0.5, 0.25]
    assert ask({"node": "PhasedDMDSampler", "inputs": widgets, "locale": "zh"})[1]["error"].startswith(
        "\u8bf7\u8fde\u63a5"
    )
    for body, message in (
        (
            {"node": "PhasedDMDPlanFromSteps", "inputs": {"steps": "0", "shift": 5}},
            "steps are whole numbers of at least",
        ),
        ({"node": "PhasedDMDSampler", "inputs": widgets}, "connect a MODEL of phased experts"),
        ({**experts, "from": {}}, "connect a plan"),
        ({**experts, "node": "PhasedDMDPlanReport", "unknown": ["sigmas"]}, "other nodes compute sigmas"),
        (
            {**gentle, "from": {"model": {"node": "PhasedDMDLoadDiffusersFolder"}}},
            "this MODEL carries no phased experts",
        ),
        ({**steps, "unknown": ["shift"]}, "shown after a run: other nodes compute shift"),
        ({"node": "PhasedDMDLoadExperts", "inputs": {"experts": "(Hub id)"}}, "shown after a run: the experts are on"),
    ):
        status, data = ask(body)
        assert status == 200 and message in data["error"], body
    for body in ({"inputs": {}}, [], {"node": "PhasedDMDPlanFromSteps", "inputs": {}}):
        assert ask(body)[0] == 400
