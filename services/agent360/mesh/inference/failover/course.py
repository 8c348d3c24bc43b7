"""How far one request has come with its tries."""

from __future__ import annotations

import math

import grpc

from agent360.client.errors import MeshError, UnavailableError
from agent360.mesh.inference.failover.verdict import Cure, cure
from agent360.mesh.inference.settings import ModelSettings


class Course:
    """The tries of one request at the models of its route.

    A round asks every backend of every model of the route at most once. Backends that cannot be
    cured by time, and models without a queue or budget for it, are left out of further rounds.
    """

    __slots__ = (
        "_failed",
        "_first_error",
        "_hopeless",
        "_met",
        "_no_more",
        "_tries_at",
        "over",
        "queue_s",
        "reason",
        "rounds",
        "tries",
        "waited_s",
    )

    def __init__(self) -> None:
        self.tries = 0
        """How often a backend was asked."""
        self.rounds = 0
        """Rounds that ended without an answer."""
        self.queue_s = 0.0
        """Seconds of waiting for turns."""
        self.waited_s = 0.0
        """Seconds of waiting for backends to be asked again."""
        self.over = False
        """Something was said, or the request itself is at fault: nothing else is tried."""
        self.reason = ""
        """That of the last failure."""
        self._tries_at: dict[str, int] = {}
        self._failed: set[tuple[str, str]] = set()
        self._hopeless: set[tuple[str, str]] = set()
        self._no_more: set[str] = set()
        self._met: set[str] = set()
        self._first_error: MeshError | None = None

    def tries_at(self, model: str) -> int:
        """How often a model was asked."""
        return self._tries_at.get(model, 0)

    def first_meets(self, model: str) -> bool:
        """Whether a model comes up for the first time; it may then not be asked all the same."""
        if model in self._met:
            return False
        self._met.add(model)
        return True

    def asks(self, model: str) -> None:
        """A backend of a model is asked."""
        self.tries += 1
        self._tries_at[model] = self._tries_at.get(model, 0) + 1

    def may_ask(self, model: str, backend: str) -> bool:
        """Whether a backend can be asked in this round."""
        return (model, backend) not in self._failed

    def failed(self, model: str, backend: str, error: MeshError, *, fallback: bool) -> None:
        """A try failed. Without a backend, the model's queue refused it."""
        remedy, self.reason = cure(error), error.reason
        if remedy is Cure.NOTHING and not fallback:
            self.over = True
        if not backend:
            self._no_more.add(model)
        self._failed.add((model, backend))
        if remedy is not Cure.AGAIN:
            self._hopeless.add((model, backend))
        # What is told in the end is what the model that was asked for said last.
        if self._first_error is None or not fallback:
            self._first_error = error

    def no_more(self, model: str) -> None:
        """A model is not asked again."""
        self._no_more.add(model)

    def next_round(self) -> None:
        """All that could be asked was asked; what time can cure may be asked again."""
        self.rounds += 1
        self._failed = set(self._hopeless)

    def hopeful(self, model: ModelSettings, max_tries: int) -> list[str]:
        """The backends of a model that may do better in a further round."""
        if model.name in self._no_more or self._tries_at.get(model.name, 0) >= max_tries:
            return []
        return [name for name in model.backends if (model.name, name) not in self._hopeless]

    def error(self, model: str, why: str, again_in_s: float) -> MeshError:
        """What the caller is told in the end.

        Args:
            model: the one that was asked for.
            why: why its backends are left alone, where none was asked.
            again_in_s: when they may be asked again, in seconds; zero or infinity: not known.
        """
        error = self._first_error or UnavailableError(
            f"no backend of {model} is to be asked now: {why}",
            reason="BACKENDS_RESTING",
            metadata={"model": model},
        )
        error.metadata = {**error.metadata, "tries": str(self.tries)}
        passing = error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
        if passing and 0 < again_in_s < math.inf:
            error.retry_after_s = max(error.retry_after_s or 0.0, again_in_s)
        return error
