"""Faults of the simulator: by marker, by header, by seeded rate."""

import pytest

from agent360.mesh.simulator.faults import Behaviour, DirectiveError, Faults
from agent360.mesh.simulator.settings import SimulatorSettings

NO_RATES = Faults(SimulatorSettings())


@pytest.mark.parametrize(
    ("marker", "expected"),
    [
        ("[[sim:error=503]]", Behaviour(error=503)),
        ("[[sim:error=429]] [[sim:retry_after=2.5]]", Behaviour(error=429, retry_after=2.5)),
        ("[[sim:stall=5]]", Behaviour(stall_s=5.0)),
        ("[[sim:stall=5@10]]", Behaviour(stall_s=5.0, stall_after=10)),
        ("[[sim:break=10]]", Behaviour(break_after=10)),
        ("[[sim:tokens=200]]", Behaviour(tokens=200)),
        ("[[sim:ttft=0.5]][[sim:itl=0.01]]", Behaviour(first_token_s=0.5, inter_token_s=0.01)),
        ("[[sim:no_usage]]", Behaviour(usage=False)),
        ("[[sim:malformed=3]]", Behaviour(malformed_after=3)),
    ],
)
def test_a_marker_in_the_prompt_is_obeyed(marker, expected):
    assert NO_RATES.behaviour(f"Summarise this. {marker}", "") == expected


def test_a_header_is_obeyed_like_markers():
    assert NO_RATES.behaviour("", "error=500, retry_after=1") == Behaviour(error=500, retry_after=1)


@pytest.mark.parametrize(
    ("prompt", "header"),
    [
        ("[[sim:explode=1]]", ""),
        ("[[sim:error=200]]", ""),
        ("[[sim:stall=nan]]", ""),
        ("[[sim:tokens=0]]", ""),
        ("", "error=503; drop"),
    ],
)
def test_what_is_not_understood_is_refused_rather_than_ignored(prompt, header):
    with pytest.raises(DirectiveError):
        NO_RATES.behaviour(prompt, header)


def test_rates_strike_the_same_requests_for_the_same_seed_and_about_as_many_as_asked():
    settings = SimulatorSettings(error_rate=0.2, break_rate=0.1, seed=7)
    one, other = Faults(settings), Faults(settings)
    struck = [one.behaviour("", "") for _ in range(2_000)]
    assert struck == [other.behaviour("", "") for _ in range(2_000)]
    assert 300 < sum(each.error == 503 for each in struck) < 500
    assert 130 < sum(each.break_after is not None for each in struck) < 270


def test_without_rates_nothing_goes_wrong():
    assert all(NO_RATES.behaviour("", "") == Behaviour() for _ in range(100))
