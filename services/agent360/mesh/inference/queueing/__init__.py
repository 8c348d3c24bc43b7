"""Queues in front of models: turns by priority, fair shares and deadlines, within limits.

Example:
    >>> async with queues.turn(model, Ticket("acme", tokens=900)) as turn:
    ...     ending = await turn.member.backend.generate(prompt, name, sink, streamed=True)
    ...     turn.outcome(tokens=ending.usage.output_tokens)
"""

from agent360.mesh.inference.queueing.queues import Queues
from agent360.mesh.inference.queueing.statistics import Statistics
from agent360.mesh.inference.queueing.ticket import Ticket
from agent360.mesh.inference.queueing.turn import Turn

__all__ = ["Queues", "Statistics", "Ticket", "Turn"]
