"""The errors of requests that get no turn."""

from __future__ import annotations

from typing import Final

import grpc

from agent360.client.errors import DeadlineExceededError, MeshError

_SOONEST_S: Final = 0.01


def full(model: str, waiting: int, again_in_s: float | None) -> MeshError:
    """The error of a request for which the queue has no room."""
    return MeshError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "QUEUE_FULL",
        f"the queue of {model} is full ({waiting} requests wait), and this tenant already has its "
        "share of it; repeat later or ask another model",
        metadata={"model": model, "queued": str(waiting)},
        retry_after_s=None if again_in_s is None else max(_SOONEST_S, again_in_s),
    )


def hopeless(model: str, waiting: int, expected_s: float, left_s: float) -> MeshError:
    """The error of a request that would miss its deadline, told on its arrival."""
    return DeadlineExceededError(
        f"{model} is too busy to answer in time: {waiting} requests wait, an answer is expected in "
        f"{expected_s:.2f} s and the deadline is in {max(0.0, left_s):.2f} s; allow more time or "
        "repeat later",
        reason="QUEUE_DEADLINE",
        metadata={
            "model": model,
            "when": "arrival",
            "queued": str(waiting),
            "expected_s": f"{expected_s:.3f}",
        },
        retry_after_s=max(_SOONEST_S, expected_s - left_s),
    )


def displacing(model: str, waiting: int, again_in_s: float | None) -> MeshError:
    """The error of a request that would make others late that were let in before it."""
    return DeadlineExceededError(
        f"{model} is too busy to answer in time: {waiting} requests wait, and some of this "
        "tenant's would miss their deadlines for it; allow more time or repeat later",
        reason="QUEUE_DEADLINE",
        metadata={"model": model, "when": "arrival", "queued": str(waiting)},
        retry_after_s=None if again_in_s is None else max(_SOONEST_S, again_in_s),
    )


def waited_too_long(
    model: str, waited_s: float, *, deadline: bool, again_in_s: float | None
) -> MeshError:
    """The error of a request whose deadline or longest wait passed in the queue."""
    what = "its deadline was too near to meet" if deadline else "the longest wait was over"
    return DeadlineExceededError(
        f"the request waited {waited_s:.2f} s for {model} when {what}; repeat later or allow "
        "more time",
        reason="QUEUE_DEADLINE",
        metadata={"model": model, "when": "waiting", "waited_s": f"{waited_s:.3f}"},
        retry_after_s=None if again_in_s is None else max(_SOONEST_S, again_in_s),
    )


def crowded_out(model: str, again_in_s: float | None) -> MeshError:
    """The error of a request that had to leave a full queue to one with a better claim."""
    return MeshError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "QUEUE_FULL",
        f"the queue of {model} is full, and this tenant held more than its share of it; send less "
        "at a time or repeat later",
        metadata={"model": model},
        retry_after_s=None if again_in_s is None else max(_SOONEST_S, again_in_s),
    )
