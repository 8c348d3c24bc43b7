"""Which backend of a model is asked: affinity first, then the model's policy."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from agent360.mesh.inference.conversation import Message, Prompt, TextPart
from agent360.mesh.inference.members import Member
from agent360.mesh.inference.rendezvous import score
from agent360.mesh.inference.settings import ModelSettings


class Asking(Protocol):
    """What of a request bears on the choice of its backend; ``queueing.Ticket`` has it."""

    @property
    def tokens(self) -> int:
        """Tokens that it will probably take, of prompt and answer."""

    @property
    def session(self) -> str:
        """What keeps requests together, from ``affinity_key``; empty: nothing."""


class Selector:
    """Chooses among the backends of a model.

    Only those in the best condition are looked at (``Member.rank``). A request with a session goes
    where rendezvous hashing of that session puts it, so that a backend that comes or goes moves
    only its own share of the sessions; a backend with more than its share of the outstanding
    tokens is passed over for the session's next one (consistent hashing with bounded loads,
    Mirrokni, Thorup, Zadimoghaddam 2016). Any other request follows the model's policy.

    Example:
        >>> member = Selector(random.Random()).choose(model, fleet.members(model), ticket)
    """

    def __init__(
        self, randomness: random.Random, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._random = randomness
        self._clock = clock
        self._turns: dict[tuple[str, str], float] = {}

    def choose(self, model: ModelSettings, members: Sequence[Member], ticket: Asking) -> Member:
        """The backend to ask.

        Args:
            model: whose backends they are.
            members: those that have room; at least one.
            ticket: the request.
        """
        if len(members) == 1:
            return members[0]
        best = min(member.rank(model) for member in members)
        fit = [member for member in members if member.rank(model) == best]
        if len(fit) == 1:
            return fit[0]
        if ticket.session and model.affinity != "none":
            return self._by_hash(model, fit, ticket)
        match model.policy:
            case "two_choices":
                return self._better_of_two(model, fit, ticket)
            case "weights":
                return self._in_turn(model, fit)
            case _:
                return self._least_tokens(model, fit)

    def _by_hash(self, model: ModelSettings, fit: Sequence[Member], ticket: Asking) -> Member:
        tokens = max(1, ticket.tokens)
        outstanding = tokens + sum(member.outstanding_tokens for member in fit)
        weights = sum(model.weight_of(member.name) for member in fit)
        share = model.affinity_load * outstanding / weights
        # At least one has room: the least loaded has no more than its share without the factor.
        with_room = [
            member
            for member in fit
            if member.outstanding_tokens < share * model.weight_of(member.name)
        ]
        return max(
            with_room,
            key=lambda member: score(ticket.session, member.name, model.weight_of(member.name)),
        )

    def _least_tokens(self, model: ModelSettings, fit: Sequence[Member]) -> Member:
        def load(member: Member) -> float:
            return member.outstanding_tokens / model.weight_of(member.name)

        least = min(map(load, fit))
        return self._random.choice([member for member in fit if load(member) == least])

    def _better_of_two(self, model: ModelSettings, fit: Sequence[Member], ticket: Asking) -> Member:
        one, other = self._random.sample(fit, 2)
        tokens, now = max(1, ticket.tokens), self._clock()
        loads = [
            (member.outstanding_tokens + tokens) / model.weight_of(member.name)
            for member in (one, other)
        ]
        latencies = one.latency_s(now), other.latency_s(now)
        if latencies[0] is not None and latencies[1] is not None:
            loads = [loads[0] * latencies[0], loads[1] * latencies[1]]
        return one if loads[0] <= loads[1] else other

    def _in_turn(self, model: ModelSettings, fit: Sequence[Member]) -> Member:
        """Smooth weighted round robin: exact over a round, and no runs within it."""
        turns, total = self._turns, 0.0
        for member in fit:
            weight = model.weight_of(member.name)
            key = (model.name, member.name)
            turns[key] = turns.get(key, 0.0) + weight
            total += weight
        chosen = max(fit, key=lambda member: turns[model.name, member.name])
        turns[model.name, chosen.name] -= total
        return chosen


def policy_of(model: ModelSettings, prompt: Prompt) -> str:
    """What chooses the backend for a request: ``only``, ``session``, ``prefix``, or the policy."""
    if len(model.backends) == 1:
        return "only"
    return _affinity_of(model, prompt) or model.policy


def affinity_key(model: ModelSettings, prompt: Prompt, tenant: str) -> str:
    """What keeps requests of a tenant on one backend; empty: nothing."""
    match _affinity_of(model, prompt):
        case "session":
            return f"session:{tenant}:{prompt.hints.session_id}"
        case "prefix":
            return f"prefix:{tenant}:{_beginning(prompt, model.affinity_prefix_bytes)}"
        case _:
            return ""


def _affinity_of(model: ModelSettings, prompt: Prompt) -> str:
    if model.affinity == "none":
        return ""
    if prompt.hints.session_id:
        return "session"
    return "prefix" if model.affinity == "prefix" else ""


def _beginning(prompt: Prompt, size: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for tool in prompt.tools:
        digest.update(f"{tool.name}\0{tool.description}\0".encode())
    left = size
    for message in prompt.messages:
        text = f"{message.role}\0{_text_of(message)[:left]}\0".encode()[:left]
        digest.update(text)
        left -= len(text)
        if left <= 0:
            break
    return digest.hexdigest()


def _text_of(message: Message) -> str:
    if message.parts:
        return "".join(part.text for part in message.parts if isinstance(part, TextPart))
    return message.content
