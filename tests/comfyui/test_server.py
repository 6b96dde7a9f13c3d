"""The real server: workflows posted, pictures returned, interrupts survived."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import random
import re
import struct
from typing import Any

import aiohttp
import numpy as np
import pytest
from PIL import Image

from tests.comfyui.conftest import EXPERTS
from tests.helpers.comfyui.server import Server


def workflow(seed: int = 1, prefix: str = "phased", sampler: str = "PhasedDMDSampler") -> dict[str, Any]:
    """The embedded teacher with experts, in API format, to a saved picture."""
    sampling = {"model": ["2", 0], "positive": ["3", 0], "negative": ["4", 0], "latent_image": ["5", 0], "seed": seed}
    sampling |= {"steps": 0, "cfg": 1.0, "sampler_name": "euler", "denoise": 1.0}
    if sampler == "KSampler":
        sampling |= {"steps": 4, "scheduler": "simple"}
    experts = {"experts": EXPERTS, "hub_id": "", "strength": 1.0, "cfg": "trained", "set_shift": True}
    return {
        "1": {"class_type": "PhasedDMDLoadDiffusersFolder", "inputs": {"folder": "teacher", "tokens": 16}},
        "2": {"class_type": "PhasedDMDLoadExperts", "inputs": {**experts, "base_1": ["1", 0]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a panda on a blue background"}},
        "4": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "5": {
            "class_type": "EmptyHunyuanLatentVideo",
            "inputs": {"width": 64, "height": 64, "length": 1, "batch_size": 1},
        },
        "6": {"class_type": sampler, "inputs": sampling},
        "7": {"class_type": "VAEDecode", "inputs": {"samples": ["6", 0], "vae": ["1", 2]}},
        "8": {"class_type": "SaveImage", "inputs": {"images": ["7", 0], "filename_prefix": prefix}},
        "9": {"class_type": "PhasedDMDPlanReport", "inputs": {"model": ["2", 0]}},
    }


def pixels(server: Server, outputs: dict[str, Any], node: str = "8") -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(server.picture(outputs[node]["images"][0]))))


def test_a_workflow_gives_a_picture_a_report_and_the_time_line(server: Server) -> None:
    prompt = workflow()
    prompt["2"]["inputs"]["strength"] = 0.9  # not a node that another test has left in the server's cache
    outputs = server.run(prompt)
    picture = pixels(server, outputs)
    assert picture.shape == (64, 64, 3) and picture.std() > 5
    assert "step 4  low_noise  sigma 0.6250" in outputs["9"]["text"][0]
    for node in ("2", "6"):
        assert [phase["name"] for phase in outputs[node]["phase_plan"][0]["phases"]] == ["high_noise", "low_noise"]


def test_a_plain_ksampler_gives_the_same_picture(server: Server) -> None:
    ours, core = (
        pixels(server, server.run(workflow(3, f"same_{node}", node))) for node in ("PhasedDMDSampler", "KSampler")
    )
    assert np.abs(ours.astype(int) - core.astype(int)).max() <= 1  # 8-bit rounding


def test_object_info_has_help_and_words_in_two_languages(server: Server) -> None:
    info = {name: entry for name, entry in server.get("/object_info").items() if name.startswith("PhasedDMD")}
    assert len(info) >= 10
    words = server.get("/i18n")
    for name in info:
        help_text = server.get(f"/extensions/phased-dmd/docs/{name}.md").decode()
        assert len(help_text.split()) > 30, name
        sockets = [*info[name]["input"].get("required", {}), *info[name]["input"].get("optional", {})]
        for language in ("en", "zh"):
            entry = words[language]["nodeDefs"][name]
            assert entry["display_name"] and entry["description"]
            assert set(entry["inputs"]) == set(sockets), (language, name)
            assert all(each["tooltip"] for each in [*entry["inputs"].values(), *entry["outputs"].values()])
            assert len(entry["outputs"]) == len(info[name]["output"])
        assert words["en"]["nodeDefs"][name]["display_name"] == info[name]["display_name"]
        assert words["zh"]["nodeDefs"][name]["display_name"] != info[name]["display_name"]


PREVIEWS, TEXT = (1, 4), 3
"""Kinds of binary messages."""


def watched(server: Server, prompt: dict[str, Any]) -> tuple[list[tuple[int, int]], int, list[str]]:
    """What the front end hears while a prompt runs: progress of node 6, the number of previews, texts on node 6."""

    async def watch() -> tuple[list[tuple[int, int]], int, list[str]]:
        progress, previews, texts = [], 0, []
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{server.url}/ws?clientId=watcher") as ws:
            body = {"prompt": prompt, "client_id": "watcher"}
            async with session.post(f"{server.url}/prompt", json=body) as answer:
                assert (await answer.json())["node_errors"] == {}
            async for message in ws:
                if message.type == aiohttp.WSMsgType.BINARY:
                    (kind, length), rest = struct.unpack(">II", message.data[:8]), message.data[8:]
                    previews += kind in PREVIEWS
                    if kind == TEXT and rest[:length] == b"6":
                        texts.append(rest[length:].decode())
                    continue
                said = json.loads(message.data)
                if said["type"] == "progress" and said["data"]["node"] == "6":
                    progress.append((said["data"]["value"], said["data"]["max"]))
                if said["type"] in ("execution_success", "execution_error"):
                    break
        return progress, previews, texts

    return asyncio.run(watch())


def test_one_progress_bar_and_previews_go_over_both_experts(server: Server) -> None:
    prompt = workflow(21, "watched")
    prompt["6"]["inputs"]["steps"] = 8
    progress, previews, _ = watched(server, prompt)
    assert [value for value in dict.fromkeys(progress) if value[0]] == [(step, 8) for step in range(1, 9)]
    assert previews >= 8


def test_a_wrong_number_of_steps_is_said_on_the_sampler_and_in_the_log(server: Server) -> None:
    def run(steps: int) -> tuple[list[str], list[str]]:
        prompt, logged = workflow(next(seeds), "steps", "KSampler"), len(server.log.read_text())
        prompt["6"]["inputs"]["steps"] = steps
        texts = watched(server, prompt)[2]
        lines = [line for line in server.log.read_text()[logged:].splitlines() if "Phased experts" in line]
        changes = [line for line in lines if re.search(r"step \d+ of \d+: ", line)]
        assert any("low_noise, sigma 0.8333, cfg 1" in line for line in changes) or steps != 4
        assert not any("[WARNING]" in line for line in changes)  # older ComfyUI writes no levels
        return texts, [line for line in lines if line not in changes]

    seeds = itertools.count(300)
    run(4)  # whatever stood on the node
    assert run(4) == ([], [])
    (text,), (line,) = run(9)
    assert text == "9 steps, trained for 4: use 4 and scheduler simple (0 on Phased Sampler)" and text in line
    assert run(4) == (["these are trained sigmas"], [])  # in the place of the warning
    assert run(4) == ([], [])


@pytest.mark.parametrize(
    ("node", "changes", "message"),
    [
        ("2", {"experts": "(Hub id)"}, "give a Hub id"),
        ("2", {"experts": "gone"}, "no experts folder 'gone'"),
        ("2", {"cfg": "a lot"}, "cfg is a number from 0 to 100"),
        ("6", {"model": ["1", 0]}, "this MODEL carries no phased experts"),
    ],
)
def test_what_users_get_wrong_is_said_on_the_node(
    server: Server, node: str, changes: dict[str, Any], message: str
) -> None:
    prompt = workflow()
    prompt[node]["inputs"] |= changes
    answer = server.post("/prompt", {"prompt": prompt})
    if "prompt_id" in answer and not answer["node_errors"]:
        found = str(server.finished(answer["prompt_id"])["status"]["messages"])
        assert f"'node_id': '{node}'" in found
    else:
        found = str(answer)
    assert message in found


def test_a_hundred_prompts_with_random_interrupts_leave_the_server_healthy(server: Server) -> None:
    expected = pixels(server, server.run(workflow(7, "expected")))
    logged, chance = len(server.log.read_text()), random.Random(0)
    queued = [server.queue(workflow(100 + n, "interrupted")) for n in range(100)]
    ended: list[str] = []
    for prompt_id in queued:
        if chance.random() < 0.5:
            server.post("/interrupt", {})
        history = server.finished(prompt_id)
        messages = [kind for kind, _ in history["status"]["messages"]]
        assert "execution_error" not in messages, history
        ended.append(messages[-1])
    assert {"execution_success", "execution_interrupted"} <= set(ended)
    assert server.get("/queue") == {"queue_running": [], "queue_pending": []}
    again = workflow(7, "again")
    assert np.array_equal(pixels(server, server.run(again)), expected)
    assert "Traceback" not in server.log.read_text()[logged:]
