"""``agent360-mesh generate``: killed, taken up again, interrupted, and told bad lines."""

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from support.openai_front import fronted
from support.polling import eventually
from support.servers import NOBODY, running

from agent360.mesh.runtime.server import Server
from agent360.mesh.simulator import Simulator, SimulatorSettings

CONCURRENCY = 8


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    settings = SimulatorSettings(port=0, first_token_s=0.005, inter_token_s=0.0)
    async with Simulator(settings) as started:
        yield started


@pytest.fixture
async def server(simulator: Simulator) -> AsyncIterator[Server]:
    async with fronted(simulator) as started:
        yield started


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return tmp_path / "prompts.jsonl"


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


def write(file: Path, lines: Sequence[Any]) -> None:
    file.write_text(
        "".join(f"{each if isinstance(each, str) else json.dumps(each)}\n" for each in lines)
    )


def put(file: Path, content: str) -> None:
    file.write_text(content)


def content_of(file: Path) -> str:
    return file.read_text()


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def asked(simulator: Simulator) -> int:
    return simulator.load.by_path["/v1/chat/completions"]


@asynccontextmanager
async def started(address: str, prompts: Path, answers: Path, *more: str) -> AsyncIterator[Process]:
    program = Path(sys.executable).with_name("agent360-mesh")
    arguments = ("generate", prompts, "-o", answers, f"--address={address}", "--model=small")
    process = await asyncio.create_subprocess_exec(
        program,
        *map(str, arguments),
        f"--concurrency={CONCURRENCY}",
        *more,
        stdout=PIPE,
        stderr=PIPE,
        env={**os.environ, "COLUMNS": "200"},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def generate(server: Server | str, *arguments: Any) -> tuple[int, str]:
    """Runs the command to its end; its exit code, and what it printed."""
    address = server if isinstance(server, str) else server.address
    prompts, answers, *more = arguments
    async with started(address, prompts, answers, *more) as process, asyncio.timeout(60):
        _, said = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()


async def test_every_line_is_answered_with_its_id_and_summed_up(
    server: Server, prompts: Path, answers: Path
) -> None:
    write(
        prompts,
        [
            {"id": "q1", "prompt": "Name a river", "max_tokens": 3, "metadata": {"gold": "Po"}},
            {"messages": [{"role": "user", "content": "Name a lake"}], "model": "family/large"},
        ],
    )
    code, said = await generate(server, prompts, answers)
    assert code == 0, said
    first, second = sorted(records(answers), key=lambda each: each["index"])
    assert (first["id"], first["metadata"], first["finish_reason"]) == (
        "q1",
        {"gold": "Po"},
        "length",
    )
    assert first["usage"]["output_tokens"] == 3
    assert second["text"].startswith("This is a simulated answer")
    assert (second["model"], second["rule"], second["source"]) == (
        "family/large",
        "explicit",
        "model",
    )
    assert "id" not in second
    assert "answered now" in said


async def test_a_killed_job_goes_on_and_pays_nothing_twice_that_it_had_written(
    server: Server, simulator: Simulator, prompts: Path, answers: Path
) -> None:
    count = 300
    write(prompts, [{"prompt": f"About number {n} [[sim:ttft=0.02]]"} for n in range(count)])
    async with started(server.address, prompts, answers) as process:
        await eventually(
            lambda: answers.exists() and answers.read_bytes().count(b"\n") > 50, timeout_s=30
        )
        process.send_signal(signal.SIGKILL)
        await process.wait()
    await eventually(lambda: simulator.load.running == 0)
    written = content_of(answers).count("\n")
    paid = asked(simulator)
    assert 50 < written < count
    # What was answered and not yet written is the group that was being written and the next one.
    assert paid - written <= 3 * CONCURRENCY
    with answers.open("ab") as file:
        file.write(b'{"index":299,"key":"00')
    code, said = await generate(server, prompts, answers)
    assert code == 0, said
    assert asked(simulator) - paid == count - written
    assert [each["index"] for each in sorted(records(answers), key=lambda r: r["index"])] == list(
        range(count)
    )
    assert "half-written" in said
    code, said = await generate(server, prompts, answers)
    assert code == 0, said
    assert asked(simulator) - paid == count - written


async def test_what_was_answered_and_not_written_comes_from_the_cache(
    simulator: Simulator, prompts: Path, answers: Path
) -> None:
    write(prompts, [{"prompt": f"About number {n}", "temperature": 0.0} for n in range(20)])
    async with (
        running("cache") as cache,
        fronted(
            simulator, cache={"enabled": True, "timeout_s": 5}, mesh={"cache": cache.address}
        ) as server,
    ):
        assert (await generate(server, prompts, answers))[0] == 0
        put(answers, "")
        code, said = await generate(server, prompts, answers)
    assert code == 0, said
    assert asked(simulator) == 20
    assert {each["source"] for each in records(answers)} == {"cache"}
    assert "from the cache" in said


async def test_an_interrupted_job_writes_what_is_done_and_says_how_to_go_on(
    server: Server, simulator: Simulator, prompts: Path, answers: Path
) -> None:
    write(prompts, [{"prompt": f"About number {n} [[sim:ttft=0.02]]"} for n in range(300)])
    async with started(server.address, prompts, answers) as process:
        await eventually(
            lambda: answers.exists() and answers.read_bytes().count(b"\n") > 20, timeout_s=30
        )
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(10):
            _, said = await process.communicate()
    assert process.returncode == 130
    assert b"the same command goes on" in said
    assert 20 < len(records(answers)) < 300


async def test_bad_lines_are_told_by_number_and_the_others_answered(
    server: Server, simulator: Simulator, prompts: Path, answers: Path
) -> None:
    write(
        prompts,
        [
            {"prompt": "Name a river"},
            '{"prompt": "Name',
            {"prompt": "Name a sea", "temprature": 1},
            "",
            {"prompt": "Name a lake"},
        ],
    )
    code, said = await generate(server, prompts, answers, "--ordered")
    assert code == 1
    first, second, third, last = records(answers)
    assert [each["index"] for each in (first, second, third, last)] == [0, 1, 2, 4]
    assert second["error"]["message"].startswith("line 2: is not JSON")
    assert "temprature" in third["error"]["message"]
    assert "line 2: is not JSON" in said
    assert "LINE_UNREADABLE" in said
    assert asked(simulator) == 2


async def test_errors_are_kept_by_line_and_tried_again_by_the_next_run(
    server: Server, simulator: Simulator, prompts: Path, answers: Path
) -> None:
    lines = [{"prompt": f"About number {n}", "model": "nameless"} for n in range(3)]
    write(prompts, [*lines, {"prompt": "Name a river"}])
    code, said = await generate(server, prompts, answers)
    assert code == 1
    assert said.count("MODEL_UNKNOWN") == 1
    assert sum("error" in each for each in records(answers)) == 3
    code, _ = await generate(server, prompts, answers, "--keep-errors")
    assert code == 0
    assert asked(simulator) == 1
    code, said = await generate(server, prompts, answers)
    assert code == 1
    assert "3 errors of earlier runs were tried again" in said
    assert len(records(answers)) == 4
    assert asked(simulator) == 1


async def test_limits_are_waited_out(simulator: Simulator, prompts: Path, answers: Path) -> None:
    limits = prompts.with_name("limits.toml")
    limits.write_text(
        '[[limits]]\nid = "few"\nname = "inference.requests"\namount = 5\nperiod = "1s"\n'
    )
    write(prompts, [{"prompt": f"About number {n}"} for n in range(15)])
    async with (
        running("ratelimit", limits=limits) as limiter,
        fronted(
            simulator,
            limits={"enabled": True, "timeout_s": 5},
            mesh={"ratelimit": limiter.address},
        ) as server,
    ):
        code, said = await generate(server, prompts, answers)
    assert code == 0, said
    assert "tries beyond the first" in said
    assert asked(simulator) == 15


async def test_answers_are_put_in_the_prompts_order_where_that_is_asked_for(
    server: Server, prompts: Path, answers: Path
) -> None:
    slow = "[[sim:ttft=0.3]]"
    write(
        prompts, [{"prompt": f"About number {n} {slow if n % 7 == 0 else ''}"} for n in range(40)]
    )
    assert (await generate(server, prompts, answers))[0] == 0
    assert [each["index"] for each in records(answers)] != list(range(40))
    assert (await generate(server, prompts, answers, "--ordered"))[0] == 0
    assert [each["index"] for each in records(answers)] == list(range(40))


async def test_a_changed_line_is_asked_anew_and_its_old_answer_pointed_out(
    server: Server, simulator: Simulator, prompts: Path, answers: Path
) -> None:
    write(prompts, [{"id": n, "prompt": f"About number {n}"} for n in range(3)])
    assert (await generate(server, prompts, answers))[0] == 0
    write(
        prompts,
        [{"id": n, "prompt": f"About number {n}"} for n in (2, 0)] + [{"id": 1, "prompt": "Else"}],
    )
    code, said = await generate(server, prompts, answers)
    assert code == 0
    assert asked(simulator) == 4
    assert "1 answers" in said


async def test_what_cannot_be_done_is_said_before_the_first_line(
    server: Server, simulator: Simulator, prompts: Path, answers: Path
) -> None:
    write(prompts, [{"prompt": "Name a river"}])
    code, said = await generate(NOBODY, prompts, answers)
    assert code == 2
    assert NOBODY in said
    code, said = await generate(server, prompts.with_name("missing.jsonl"), answers)
    assert (code, "missing.jsonl" in said) == (2, True)
    code, said = await generate(server, prompts, prompts)
    assert (code, "cannot go into" in said) == (2, True)
    put(answers, "something else\n")
    code, said = await generate(server, prompts, answers)
    assert (code, "no answer of this command" in said) == (2, True)
    assert content_of(answers) == "something else\n"
    assert asked(simulator) == 0


async def test_a_service_that_stays_away_stops_the_job_and_costs_no_line_its_answer(
    server: Server, simulator: Simulator, prompts: Path, answers: Path
) -> None:
    write(prompts, [{"prompt": f"About number {n} [[sim:ttft=0.02]]"} for n in range(300)])
    async with started(server.address, prompts, answers, "--patience=1.5") as process:
        await eventually(
            lambda: answers.exists() and answers.read_bytes().count(b"\n") > 20, timeout_s=30
        )
        await server.stop()
        async with asyncio.timeout(30):
            _, said = await process.communicate()
    assert process.returncode == 2, said
    assert server.address.encode() in said
    assert not [each for each in records(answers) if "error" in each]
    async with fronted(simulator) as another:
        code, printed = await generate(another, prompts, answers)
    assert code == 0, printed
    assert len(records(answers)) == 300
