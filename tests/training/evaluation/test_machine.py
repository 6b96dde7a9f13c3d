"""Commands that sample have the same options of device and memory, with the choices that samplers know."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest

from pdmd_core.arguments import CommandParser
from training import evaluate, sample
from training.evaluation.sampler import Offload
from training.memory.decoding import Decoding

NAMES = ("device", "batch_size", "dtype", "offload", "decode")


@pytest.mark.parametrize("parser", [sample.make_parser, evaluate.make_parser])
def test_choices_are_those_of_the_sampler(parser: Callable[[], CommandParser]) -> None:
    actions = {action.dest: action for action in parser()._actions}
    assert [name for name in actions if name in NAMES] == list(NAMES)
    assert tuple(actions["offload"].choices) == get_args(Offload)
    assert tuple(actions["decode"].choices) == get_args(Decoding)
    assert [actions[name].default for name in NAMES] == [None, None, "float32", "none", "auto"]
