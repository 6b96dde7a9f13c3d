from __future__ import annotations

import json

import pytest

from pdmd_core.experts import ExpertsError
from pdmd_core.experts.lora.alpha import Alphas, alphas_in

NAMES = ("alpha", "lora_alpha", "network_alpha", "ss_network_alpha")
DOCUMENTS = ("lora_adapter_metadata", "adapter_config", "lora_config")


@pytest.mark.parametrize("name", NAMES)
def test_alpha_is_found_under_each_of_its_names(name: str) -> None:
    assert alphas_in({name: "1", "rank": "4"}).scale("x", 4, None) == 0.25


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("key", ["lora_alpha", "alpha", "transformer.lora_alpha"])
def test_alpha_is_found_in_json(name: str, key: str) -> None:
    assert alphas_in({name: json.dumps({key: 2, "r": 4})}).scale("x", 4, None) == 0.5


def test_the_file_beside_those_of_peft() -> None:
    assert alphas_in({}, {"lora_alpha": 8, "r": 4, "peft_type": "LORA"}).scale("x", 4, None) == 2.0


def test_some_modules_have_their_own() -> None:
    said = {"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"^blocks.0.ffn.net.2": 1}}
    alphas = alphas_in({"lora_adapter_metadata": json.dumps(said)})
    assert alphas.scale("transformer.blocks.0.ffn.net.2", 4, None) == 0.25
    assert alphas.scale("transformer.blocks.10.ffn.net.2", 4, None) == 1.0
    assert alphas.scale("transformer.blocks.0.ffn.net.2", 4, 8.0) == 2.0


def test_the_root_of_the_rank() -> None:
    assert alphas_in({"lora_config": json.dumps({"lora_alpha": 4, "use_rslora": True})}).scale("x", 16, None) == 1.0


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"ss_network_alpha": "None", "alpha": ""},
        {"format": "pt", "lora_config": "not json", "adapter_config": "[1]"},
        {"lora_adapter_metadata": json.dumps({"text_encoder.lora_alpha": 2})},
    ],
)
def test_where_nothing_is_said_alpha_is_the_rank(metadata: dict[str, str]) -> None:
    assert alphas_in(metadata) == Alphas()
    assert Alphas().scale("x", 4, None) == 1.0


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"alpha": "1", "lora_alpha": "4"}, "more than one alpha"),
        ({"alpha": "-1"}, "alpha in the metadata is a positive number, found '-1'"),
        ({"ss_network_alpha": "many"}, "a positive number, found 'many'"),
        ({"lora_config": json.dumps({"lora_alpha": [1]})}, "lora_alpha in the metadata is a positive number"),
    ],
)
def test_an_alpha_that_is_none_is_refused(metadata: dict[str, str], message: str) -> None:
    with pytest.raises(ExpertsError, match=message):
        alphas_in(metadata)
