"""What may differ between a checkpoint's configuration and today's."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.configs import changed
from training.config.changes import changes_since, check_allowed
from training.config.schema import ConfigError, DistillConfig


def before(config: DistillConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


def test_a_refusal_names_every_key_with_both_values_and_how_to_allow_it(config: DistillConfig) -> None:
    now = changed(config, seed=7, **{"generator.lr": 0.0005, "monitoring.log_every": 3})
    with pytest.raises(ConfigError) as error:
        changes_since(before(config), now)
    text = str(error.value)
    assert text.endswith("Changed: generator.lr: 0.01 -> 0.0005; seed: 0 -> 7")
    assert "--allow-change generator.lr," in text and "--allow-change seed" not in text and "\n" not in text


def test_a_section_in_a_list_is_named_key_by_key(config: DistillConfig) -> None:
    buckets = [{"width": 16, "height": 16, "frames": 1}, {"width": 32, "height": 16, "frames": 1}]
    then = changed(config, **{"data.buckets": buckets})
    now = changed(config, **{"data.buckets": [buckets[0], {**buckets[1], "width": 48}]})
    with pytest.raises(ConfigError, match=r"Changed: data\.buckets\[1\]\.width: 32 -> 48$"):
        changes_since(before(then), now)


def test_what_is_named_is_allowed_and_what_changes_no_number_always_is(config: DistillConfig) -> None:
    now = changed(config, updates=[3, 6], **{"generator.lr": 0.5, "model.path": "elsewhere", "checkpoints.keep": 9})
    found = changes_since(before(config), now, ["generator.lr", "updates", "fake.lr"])
    assert found.requested == ["generator.lr: 0.01 -> 0.5", "updates: 3 -> [3, 6]"]
    assert found.free == ["checkpoints.keep: 2 -> 9", f"model.path: {config.model.path!r} -> 'elsewhere'"]
    assert changes_since(before(config), changed(config, updates=[3, 3])).free == [], "3 in each phase is 3"


def test_an_average_does_not_begin_in_the_middle(config: DistillConfig) -> None:
    with pytest.raises(ConfigError, match=r"ema_decay: 0\.9 -> None \(an average cannot begin or end in the middle\)"):
        changes_since(before(config), changed(config, ema_decay=None), ["ema_decay"])
    assert changes_since(before(config), changed(config, ema_decay=0.5), ["ema_decay"]).requested


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("genrator.lr", "unknown key 'genrator.lr', did you mean 'generator.lr'"),
        ("objective.fake_rollouts", "what was trained does not fit another value"),
        ("generator.rank", "what was trained does not fit another value"),
        ("monitoring.log_every", "it may always change"),
    ],
)
def test_a_key_that_cannot_be_allowed_is_one_line(key: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        check_allowed([key])
    assert "\n" not in str(error.value)
