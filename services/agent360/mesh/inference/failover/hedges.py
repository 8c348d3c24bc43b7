"""When a try is slow enough for a rival, and whether the budget allows one."""

from __future__ import annotations

import time

from agent360.mesh.inference.failover.attempt import Attempt
from agent360.mesh.inference.failover.budget import Budget
from agent360.mesh.inference.failover.job import Kind
from agent360.mesh.inference.failover.latencies import Latencies
from agent360.mesh.inference.failover.settings import HedgeSettings
from agent360.mesh.inference.settings import ModelSettings


class Hedges:
    """Measures the tries of each model, apart for each kind of work, and counts its hedges.

    Example:
        >>> hedges = Hedges(HedgeSettings(enabled=True))
        >>> hedges.requested(model)
        >>> hedges.delay_s(model, "stream")  # nothing was measured yet
    """

    def __init__(self, settings: HedgeSettings) -> None:
        self._settings = settings
        self._budgets: dict[str, Budget] = {}
        self._latencies: dict[tuple[str, Kind], Latencies] = {}

    def enabled(self, model: ModelSettings) -> bool:
        """Whether a model has hedges."""
        return (model.hedge or self._settings).enabled

    def requested(self, model: ModelSettings) -> None:
        """A request comes to a model: the budget grows by its share."""
        settings = model.hedge or self._settings
        self._budget(model).earn(settings.budget, settings.budget_burst)

    def delay_s(self, model: ModelSettings, kind: Kind) -> float | None:
        """After how many seconds without a word a try is slow; None: too few were measured."""
        settings = model.hedge or self._settings
        latencies = self._latencies.get((model.name, kind))
        if latencies is None or len(latencies) < settings.min_samples:
            return None
        return max(settings.min_delay_s, latencies.quantile(settings.quantile))

    def allowed(self, model: ModelSettings) -> bool:
        """Whether the budget allows a hedge; if so it is counted."""
        return self._budget(model).spend()

    def measured(self, attempt: Attempt, kind: Kind) -> None:
        """A try answered or, if it lost, would have taken longer than it did.

        Counting those that lost by what they took keeps the quantile from sinking with each hedge.
        """
        key = (attempt.model.name, kind)
        latencies = self._latencies.get(key)
        if latencies is None:
            latencies = self._latencies[key] = Latencies()
        heard = attempt.spoke_at if kind == "stream" and not attempt.lost else None
        latencies.add((time.monotonic() if heard is None else heard) - attempt.began)

    def _budget(self, model: ModelSettings) -> Budget:
        budget = self._budgets.get(model.name)
        if budget is None:
            # Nothing is saved at first: hedges are never more than their share of the requests.
            budget = self._budgets[model.name] = Budget(0.0)
        return budget
