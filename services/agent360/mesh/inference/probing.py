"""Looks after backends: asks whether they are there, and runs warm-ups when they have come up."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Sequence
from typing import Final

import grpc
import structlog

from agent360.client.errors import MeshError, UnavailableError
from agent360.mesh.inference.answers import Piece
from agent360.mesh.inference.catalogue import Catalogue
from agent360.mesh.inference.conversation import EmbeddingInputs, Message, Prompt, Sampling
from agent360.mesh.inference.members import Health, Member
from agent360.mesh.inference.ports import Backend
from agent360.mesh.inference.settings import ModelSettings

_SHORTEST_PAUSE_S: Final = 0.1
_WARM_UP_TOKENS: Final = 16
_JITTER: Final = 0.1


class Prober:
    """Probes backends at an interval, sooner after a failure: one that is back is soon used again.

    A backend is ready when it has answered and has run the warm-ups of its models. Where the models
    are discovered, what the backends list becomes the catalogue.

    Example:
        >>> prober = Prober(catalogue, log, discover=False, interval_s=10, timeout_s=5)
        >>> task = asyncio.create_task(prober.watch(member, ready))
    """

    def __init__(
        self,
        catalogue: Catalogue,
        log: structlog.stdlib.BoundLogger,
        *,
        discover: bool,
        interval_s: float,
        timeout_s: float,
        randomness: random.Random | None = None,
    ) -> None:
        """Probes nothing yet.

        Args:
            catalogue: whose models are warmed up; if they are discovered, it gets them.
            log: where backends that come and go are noted.
            discover: whether the catalogue is what the backends list.
            interval_s: how often a backend is asked.
            timeout_s: how long its list of models may take.
            randomness: spreads the probes of replicas; None: from the system.
        """
        self._catalogue = catalogue
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._log = log
        self._discover = discover
        self._random = randomness or random.Random()
        self._listed: dict[str, list[str]] = {}

    async def watch(self, member: Member, ready: asyncio.Event | None = None) -> None:
        """Looks after a backend until it is cancelled; ``ready`` is set when it first is."""
        pause = _SHORTEST_PAUSE_S
        while True:
            member.look.clear()
            if await self._check(member):
                if ready is not None:
                    ready.set()
                pause, wait = _SHORTEST_PAUSE_S, self._interval_s
            else:
                # The failure just seen is no reason to look again at once.
                member.look.clear()
                wait = min(pause, self._interval_s)
                pause = 2 * wait
            # However many requests fail, it is not asked more often than this.
            await asyncio.sleep(min(_SHORTEST_PAUSE_S, wait))
            rest = wait * (1 + self._random.uniform(-_JITTER, _JITTER)) - _SHORTEST_PAUSE_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, rest)):
                    await member.look.wait()

    async def _check(self, member: Member) -> bool:
        """Asks a backend for its models and runs what warm-ups are due; whether it is ready."""
        was = member.health
        try:
            if member.probed:
                await self._ask(member)
            ready, warmed = await self._warm_up(member)
        except MeshError as error:
            self._failed(member, error)
            return False
        except Exception:  # noqa: BLE001 - a fault in a backend must not end the looking after it
            self._log.exception("a probe failed", backend=member.name)
            member.failed(time.monotonic(), at_work=False)
            return False
        if member.probed or warmed or was is not Health.UNKNOWN:
            # A warm-up is work: one that succeeds proves more than a list of models.
            forgiven_after_s = 0.0 if warmed else self._interval_s / 2
            member.answered_probe(time.monotonic(), forgiven_after_s)
        if member.health is Health.READY and was is not Health.READY:
            models = len(self._listed.get(member.name, ()))
            self._log.info("backend answers", backend=member.name, models=models)
        return ready

    async def _ask(self, member: Member) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                listed = await member.backend.list_models()
        except TimeoutError as error:
            # Some errors of the mesh are TimeoutErrors, too.
            if isinstance(error, MeshError):
                raise
            raise UnavailableError(
                f"backend {member.name} did not list its models within {self._timeout_s:g} s",
                reason="UPSTREAM_STALLED",
            ) from error
        if self._listed.get(member.name) == listed:
            return
        self._listed[member.name] = listed
        if self._discover:
            self._catalogue.discovered(self._listed)

    def _failed(self, member: Member, error: MeshError) -> None:
        was = member.health
        member.failed(time.monotonic(), at_work=False)
        first = was in (Health.UNKNOWN, Health.READY)
        down = was is not Health.UNAVAILABLE and member.health is Health.UNAVAILABLE
        if first or down:
            self._log.warning(
                "backend does not answer",
                backend=member.name,
                health=member.health.name,
                reason=error.reason,
                error=error.message,
            )

    async def _warm_up(self, member: Member) -> tuple[bool, bool]:
        """Runs the warm-ups that a backend has not run since it came up.

        A model that refuses its warm-up stays unready; nothing waits for it. One whose warm-up
        fails is tried again soon.

        Returns:
            Whether none failed, and whether any succeeded.

        Raises:
            MeshError: one failed, and the backend has given no other sign of life.
        """
        ready, warmed = True, False
        for model in tuple(self._catalogue.models):
            if member.name not in model.backends or member.is_warm(model):
                continue
            began = time.monotonic()
            try:
                await _run_warm_up(member.backend, model)
            except MeshError as error:
                passing = error.code is grpc.StatusCode.UNAVAILABLE
                if passing and not member.probed:
                    raise
                self._log.warning(
                    "warm-up failed" if passing else "a model refuses its warm-up",
                    model=model.name,
                    backend=member.name,
                    reason=error.reason,
                    error=error.message,
                )
                ready = ready and not passing
                continue
            warmed = True
            member.warm.add(model.name)
            seconds = round(time.monotonic() - began, 3)
            self._log.info("model is warm", model=model.name, backend=member.name, seconds=seconds)
        return ready, warmed


async def _run_warm_up(backend: Backend, model: ModelSettings) -> None:
    if "embeddings" in model.capabilities:
        await backend.embed(EmbeddingInputs(model.name, (model.warm_up,)), model.upstream_name)
        return
    prompt = Prompt(
        model=model.name,
        messages=(Message("user", model.warm_up),),
        sampling=Sampling(max_tokens=_WARM_UP_TOKENS),
    )
    await backend.generate(prompt, model.upstream_name, _unheard, streamed=False)


def _unheard(_: Sequence[Piece]) -> None:
    """Takes what a warm-up says."""
