"""The nodes, called as a graph calls them."""

from __future__ import annotations

import asyncio
import json
from dataclasses import fields
from typing import Any

import torch

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
    fails("at least the 4 steps of the plan", "PhasedDMDSampler", model=model, **{**inputs, "steps": 2})


def test_the_report_warns_of_sigmas_that_were_not_trained(pack, models, fails) -> None:
    plan = plan_of(pack)
    picture, text = pack.call("PhasedDMDPlanReport", plan=plan, sigmas=sigmas_of(TWO))
    assert picture.ndim == 4 and picture.shape[-1] == 3 and 0 <= picture.min() < picture.max() <= 1
    assert "Warning" not in text and text.count("expert low_noise") == 2
    (simple,) = pack.call("BasicScheduler", model=models.wan(), scheduler="beta", steps=4, denoise=1.0)
    _, text = pack.call("PhasedDMDPlanReport", plan=plan, sigmas=simple)
    assert "was not trained to step" in text
    model_inputs = {"plan": plan, "cfg": "3.5, 1", "set_shift": True, "model_1": models.wan(), "model_2": models.wan()}
    (model,) = pack.call("PhasedDMDExperts", **model_inputs)
    _, text = pack.call("PhasedDMDPlanReport", model=model)
    assert "expert high_noise  cfg 3.5" in text
    _, text = pack.call("PhasedDMDPlanReport", model=model, plan=plan_of(pack, "1, 1, 2"))
    assert "Warning: the MODEL's experts follow another plan" in text
    assert pack.call("PhasedDMDPlanReport", model=models.wan(), plan=plan)[1].count("step ") == 4
    fails("connect a plan or a MODEL", "PhasedDMDPlanReport")
    fails("this MODEL carries no phased experts", "PhasedDMDPlanReport", model=models.wan())


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
    assert "expert high_noise was not trained to step" in line and "4 step(s) here, 4 trained: Phased Sigmas" in line
    (simple,) = pack.call("BasicScheduler", model=model, scheduler="simple", steps=20, denoise=1.0)
    (line,) = said(simple)
    assert "; and 15 more, all in Phase Plan Report. 20 step(s) here, 4 trained" in line and "\n" not in line
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

    status, data = ask({"node": "PhasedDMDPlanFromSteps", "inputs": {"steps": "2, 2", "shift": 5, "names": "", "x": 1}})
    assert (status, data) == (200, pack.module("comfy_nodes.timeline").timeline(plan_of(pack)))
    status, data = ask({"node": "PhasedDMDPlanFromSteps", "inputs": {"steps": "0", "shift": 5}})
    assert status == 200 and "steps are whole numbers of at least 1" in data["error"]
    for body in (
        {"node": "KSampler", "inputs": {}},
        {"inputs": {}},
        [],
        {"node": "PhasedDMDPlanFromSteps", "inputs": {}},
    ):
        assert ask(body)[0] == 400
