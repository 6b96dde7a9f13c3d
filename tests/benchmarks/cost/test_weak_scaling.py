from __future__ import annotations

import pytest

from benchmarks.cost.weak_scaling import ALONE, APART, TOGETHER, results_of, run, summary, table

TINY = ["--model=wan", "--sharding=none", "--size=tiny", "--side=4", "--batch=1", "--fake_updates=1", "--device=cpu"]


@pytest.mark.timeout(600)
def test_two_processes_are_timed_three_ways() -> None:
    rounds = run(TINY, 2)
    assert len(rounds) == 2
    assert all(one[way] > 0 for one in rounds for way in (ALONE, APART, TOGETHER))


@pytest.mark.timeout(600)
def test_two_networks_in_shards_are_timed() -> None:
    (one,) = run(["--model=wan_two_networks", "--sharding=fsdp", *TINY[2:]], 1, 2)
    assert all(one[way] > 0 for way in (ALONE, APART, TOGETHER))


@pytest.mark.timeout(600)
def test_workers_that_fail_say_why() -> None:
    with pytest.raises(RuntimeError, match=r"^0 of 1 rounds; [\s\S]*KeyError: 'no size'"):
        run([option if not option.startswith("--size") else "--size=no size" for option in TINY], 1, 1)


def test_results_are_found_among_other_output() -> None:
    output = 'noise\nresult {"alone": 1.0, "apart": 5.0}\n\nresult {"alone": 2.0}\n result {}\n'
    assert results_of(output) == [{"alone": 1.0, "apart": 5.0}, {"alone": 2.0}]


def test_ratios_are_taken_within_a_round() -> None:
    rounds = [{ALONE: 1.0, TOGETHER: 2.0, APART: 1.6}, {ALONE: 10.0, TOGETHER: 12.0, APART: 12.0}]
    found = summary(rounds)
    assert found["together / alone"]["median"] == pytest.approx(1.6)
    assert found["together / apart"]["median"] == pytest.approx(1.125)
    assert found[ALONE]["median"] == 5.5 and found["rounds"] == 2
    line = table([{"model": "wan", "sharding": "fsdp", "processes": 4, "summary": found}]).splitlines()[-1]
    assert line.startswith("| wan | fsdp | 4 | 5.5 (3.25 to 7.75) |") and line.endswith("| 1.12 (1.06 to 1.19) |")
