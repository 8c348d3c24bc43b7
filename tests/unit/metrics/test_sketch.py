"""Sketches keep their promise of 1%, also after they were merged."""

import math
import random

import pytest

from agent360.mesh.metrics.sketch import Sketch


@pytest.mark.parametrize("shape", ["uniform", "exponential", "lognormal"])
def test_quantiles_are_within_one_percent_also_after_merging(shape: str) -> None:
    chance = random.Random(7)
    draw = {
        "uniform": lambda: chance.uniform(1, 100),
        "exponential": lambda: chance.expovariate(0.1),
        "lognormal": lambda: chance.lognormvariate(0, 2),
    }[shape]
    values = [draw() for _ in range(20_000)]
    merged = Sketch()
    for first in range(0, len(values), 500):
        part = Sketch()
        for value in values[first : first + 500]:
            part.add(value)
        merged.merge(Sketch.from_bytes(part.to_bytes()))
    values.sort()
    for q in (0.01, 0.5, 0.9, 0.99):
        exact = values[int(q * (len(values) - 1))]
        assert merged.quantile(q) == pytest.approx(exact, rel=0.0101)


def test_zeros_and_negative_values_are_in_order() -> None:
    sketch = Sketch()
    for value in (-5.0, 0.0, 5.0):
        sketch.add(value)
    assert sketch.quantile(0.0) == pytest.approx(-5.0, rel=0.01)
    assert sketch.quantile(0.5) == 0.0
    assert math.isnan(Sketch().quantile(0.5))
