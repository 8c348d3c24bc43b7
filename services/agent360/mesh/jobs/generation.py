"""The job of answering a file of prompts: many at a time, durable, to be taken up again."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import msgspec

from agent360.client import (
    Answer,
    AnswerSource,
    GenerateRequest,
    Mesh,
    MeshError,
    Priority,
    call_scope,
)
from agent360.mesh.jobs.answers import Answered, AnswerFile
from agent360.mesh.jobs.prompts import LineDefaults, PromptLine, PromptReader

_FIRST_WAIT_S: Final = 0.5
_LONGEST_WAIT_S: Final = 30.0
_TRANSIENT: Final = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED})
_UNREACHABLE: Final = frozenset({"UNREACHABLE", "CLIENT_CLOSED"})
_SHOWN_FAULTS: Final = 10

_encode: Final = msgspec.json.Encoder().encode


class UnreachableError(Exception):
    """The service was away for longer than the job's patience."""


@dataclass(frozen=True, slots=True)
class JobOptions:
    """How a file is answered."""

    prompts: Path
    """JSON lines to be answered."""
    answers: Path
    """Where answers are appended."""
    defaults: LineDefaults = field(default_factory=LineDefaults)
    """For lines that do not say."""
    concurrency: int = 64
    """Lines that are worked on at a time."""
    timeout_s: float = 120.0
    """How long one try of a line may take."""
    patience_s: float = 300.0
    """How long a line is tried again while limits or an outage are in its way."""
    priority: Priority = Priority.LOW
    """Of its calls."""
    keep_errors: bool = False
    """Whether errors of earlier runs stand, instead of being tried again."""
    ordered: bool = False
    """Whether the answers are put in the order of the prompts at the end."""
    strict: bool = True
    """Whether unknown fields of a line are errors."""


@dataclass(slots=True)
class Tally:
    """What became of the lines so far."""

    lines: int = 0
    """Lines that are done, in this run or an earlier one."""
    before: int = 0
    """Lines that an earlier run has answered."""
    sources: Counter[AnswerSource] = field(default_factory=Counter)
    """Answers of this run by where they came from."""
    errors: Counter[str] = field(default_factory=Counter)
    """Errors of this run by reason."""
    faults: list[str] = field(default_factory=list)
    """The first lines that could not be read, and why."""
    retries: int = 0
    """Tries beyond the first."""
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    done_bytes: int = 0
    """Of the prompts' file."""
    dropped_bytes: int = 0
    """Of a half-written answer that was found at the start."""
    tried_again: int = 0
    """Errors of earlier runs that were taken out at the start."""
    stale: int = 0
    """Answers in the file that belong to no line any more; known at the end."""

    @property
    def answered(self) -> int:
        """Lines answered in this run."""
        return sum(self.sources.values())


@dataclass(frozen=True, slots=True)
class _Outcome:
    line: PromptLine
    record: bytes
    answer: Answer | None
    reason: str


class GenerationJob:
    """Answers a file.

    Lines are read as they are needed, worked on by ``concurrency`` tasks, and written in groups:
    while one group goes to the disk the next one gathers. Memory is bounded whatever the file's
    length, but for nine bytes for each line that an earlier run has answered.

    Example:
        >>> tally = await GenerationJob(mesh, options).run()
    """

    def __init__(self, mesh: Mesh, options: JobOptions) -> None:
        self.tally = Tally()
        """Counts, as the job goes on."""
        self._mesh = mesh
        self._options = options
        self._waiting: asyncio.Queue[PromptLine | None] = asyncio.Queue(2 * options.concurrency)
        self._outcomes: asyncio.Queue[_Outcome | None] = asyncio.Queue(4 * options.concurrency)

    async def run(self) -> Tally:
        """Answers what has no answer yet; a job that is cancelled writes what is done.

        Raises:
            UnreachableError: the service went away.
            AnswersFileError: the file of answers cannot be used.
            OSError: a file cannot be read or written.
        """
        options, tally = self._options, self.tally
        with AnswerFile(options.answers) as answers:
            found = await asyncio.to_thread(answers.repair, keep_errors=options.keep_errors)
            tally.dropped_bytes, tally.tried_again = found.dropped_bytes, found.errors
            try:
                async with asyncio.TaskGroup() as tasks:
                    writing = tasks.create_task(self._write(answers))
                    await self._read_and_work(found.answered, writing)
            except* (UnreachableError, OSError) as group:
                raise _first(group) from None
            tally.stale = found.answered.left
            if options.ordered:
                await asyncio.to_thread(answers.put_in_order)
        return tally

    # ---------------------------------------------------------------- tasks

    async def _read_and_work(self, answered: Answered, writing: asyncio.Task[None]) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read(answered))
                for _ in range(self._options.concurrency):
                    tasks.create_task(self._work())
        finally:
            # What is done is written, whatever ended the work; unless it cannot be written.
            ending = asyncio.create_task(self._outcomes.put(None))
            await asyncio.wait((writing, ending), return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait((writing,))
            ending.cancel()

    async def _read(self, answered: Answered) -> None:
        options, tally = self._options, self.tally
        reader = PromptReader(options.defaults, strict=options.strict)
        async for line in reader.lines(options.prompts):
            if answered.take(line.key):
                tally.before += 1
                tally.lines += 1
                tally.done_bytes += line.size_bytes
            else:
                await self._waiting.put(line)
        for _ in range(options.concurrency):
            await self._waiting.put(None)

    async def _work(self) -> None:
        while (line := await self._waiting.get()) is not None:
            await self._outcomes.put(await self._outcome(line))

    async def _write(self, answers: AnswerFile) -> None:
        """Writes what is done until the last; what waits while a group is written is the next."""
        ended = False
        while not ended:
            group = [await self._outcomes.get()]
            while not self._outcomes.empty():
                group.append(self._outcomes.get_nowait())
            done = [each for each in group if each is not None]
            ended = len(done) < len(group)
            if done:
                await asyncio.to_thread(answers.append, b"".join(each.record for each in done))
            for each in done:
                self._count(each)

    # ---------------------------------------------------------------- one line

    async def _outcome(self, line: PromptLine) -> _Outcome:
        if line.request is None:
            error = MeshError(grpc.StatusCode.INVALID_ARGUMENT, "LINE_UNREADABLE", line.fault)
            return _Outcome(line, _error_record(line, error), None, error.reason)
        try:
            answer = await self._answer(line.request, line.key)
        except MeshError as error:
            return _Outcome(line, _error_record(line, error), None, error.reason)
        return _Outcome(line, _answer_record(line, answer), answer, "")

    async def _answer(self, request: GenerateRequest, key: int) -> Answer:
        options = self._options
        began, wait_s = time.monotonic(), _FIRST_WAIT_S
        # The same id on every try and in every run: whoever keeps answers by it knows it again.
        request_id = str(uuid.UUID(bytes=key.to_bytes(8, "big") * 2, version=4))
        while True:
            try:
                with call_scope(priority=options.priority, request_id=request_id):
                    return await self._mesh.inference.generate(request, timeout=options.timeout_s)
            except MeshError as error:
                if not _is_transient(error):
                    raise
                pause_s = max(error.retry_after_s or 0.0, wait_s * random.uniform(0.5, 1.0))
                if time.monotonic() - began + pause_s > options.patience_s:
                    if error.reason in _UNREACHABLE:
                        raise UnreachableError(error.message) from error
                    raise
            self.tally.retries += 1
            wait_s = min(wait_s * 2, _LONGEST_WAIT_S)
            await asyncio.sleep(pause_s)

    def _count(self, outcome: _Outcome) -> None:
        tally, answer = self.tally, outcome.answer
        tally.lines += 1
        tally.done_bytes += outcome.line.size_bytes
        if answer is None:
            tally.errors[outcome.reason] += 1
            if outcome.line.fault and len(tally.faults) < _SHOWN_FAULTS:
                tally.faults.append(outcome.line.fault)
            return
        tally.sources[answer.source] += 1
        tally.input_tokens += answer.usage.input_tokens
        tally.output_tokens += answer.usage.output_tokens
        tally.cost_usd += answer.usage.cost_usd


def _is_transient(error: MeshError) -> bool:
    """Whether the same may succeed later: an outage, an overload or a limit, not its own size."""
    if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return error.retry_after_s is not None or bool(error.quotas)
    return error.code in _TRANSIENT


def _answer_record(line: PromptLine, answer: Answer) -> bytes:
    usage = answer.usage
    said: dict[str, Any] = {
        "text": answer.text,
        "finish_reason": answer.finish_reason.name.lower(),
        "model": answer.model,
        "backend": answer.backend,
        "rule": answer.rule,
        "source": answer.source.name.lower(),
        "usage": {
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "cached_input_tokens": usage.cached_input_tokens,
            "estimated": usage.estimated,
            "cost_usd": usage.cost_usd,
        },
        "total_s": answer.total_s,
    }
    if answer.tool_calls:
        said["tool_calls"] = [
            {"id": call.id, "name": call.name, "arguments": call.arguments}
            for call in answer.tool_calls
        ]
    if answer.reasoning:
        said["reasoning"] = answer.reasoning
    if answer.logprobs:
        said["logprobs"] = [
            {
                "token": each.token,
                "logprob": each.logprob,
                "alternatives": {other.token: other.logprob for other in each.alternatives},
            }
            for each in answer.logprobs
        ]
    return _record(line, said)


def _error_record(line: PromptLine, error: MeshError) -> bytes:
    said: dict[str, Any] = {
        "code": error.code.name,
        "reason": error.reason,
        "message": error.message,
    }
    if error.metadata:
        said["metadata"] = dict(error.metadata)
    return _record(line, {"error": said})


def _record(line: PromptLine, said: dict[str, Any]) -> bytes:
    head: dict[str, Any] = {"index": line.index}
    if line.id is not None:
        head["id"] = line.id
    head["key"] = f"{line.key:016x}"
    if line.metadata is not None:
        head["metadata"] = line.metadata
    return _encode(head | said) + b"\n"


def _first(group: BaseExceptionGroup[Exception]) -> Exception:
    """One of the errors of a group, which may hold groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if not isinstance(error, Exception):
        raise TypeError("a group of errors held something else")
    return error
