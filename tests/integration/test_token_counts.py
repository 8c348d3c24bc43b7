"""Tokens are counted by the best that is at hand, and it is said what that was."""

import json
from dataclasses import replace

import pytest
import structlog
from support.inference_mesh import MODELS, inference_mesh

from agent360.client.inference import TokenCount
from agent360.mesh.inference.conversation import ImagePart, Message, Prompt, Tool, ToolCall
from agent360.mesh.inference.counting.counter import TokenCounter
from agent360.mesh.inference.counting.tokenizers import Tokenizers
from agent360.mesh.inference.settings import ModelSettings

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

TEXTS = ["name three rivers of the land and three mountains", "plan a long journey there"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>"
    "{{ message.content }}{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}"
    "<|end|>{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|end|>", "<s>", "<unk>"]
PROMPT = Prompt("m", (Message("system", "plan"), Message("user", "name three rivers")))


@pytest.fixture
def directory(tmp_path):
    """A small byte-level BPE tokenizer, trained here, with a chat template beside it."""
    encoder = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    encoder.train_from_iterator(TEXTS * 10, trainer)
    encoder.save(str(tmp_path / "tokenizer.json"))
    config = {"chat_template": TEMPLATE, "bos_token": {"content": "<s>"}, "eos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def counter(members=lambda _: []) -> TokenCounter:
    return TokenCounter(Tokenizers(structlog.get_logger()), members)


def encoded(directory, text: str) -> int:
    found = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    return len(found.encode(text, add_special_tokens=False))


async def test_with_its_template_a_model_counts_exactly(directory):
    model = ModelSettings(name="m", tokenizer=directory)
    count = await counter().count(model, PROMPT)
    whole = "<s><|system|>plan<|end|><|user|>name three rivers<|end|><|assistant|>"
    assert count == (encoded(directory, whole), False, "tokenizer")
    assert count.tokens < len(whole) / 2, "special tokens are one token each"


async def test_tools_and_calls_are_counted_as_the_template_writes_them(directory):
    model = ModelSettings(name="m", tokenizer=directory)
    call = Message("assistant", tool_calls=(ToolCall("1", "find", '{"q": "rivers"}'),))
    more = replace(
        PROMPT,
        messages=(*PROMPT.messages, call, Message("tool", "three", tool_call_id="1")),
        tools=(Tool("find", "finds", {"type": "object"}),),
    )
    plain, full = await counter().count(model, PROMPT), await counter().count(model, more)
    assert not full.estimated
    assert full.tokens > plain.tokens + 20


async def test_without_a_template_texts_are_exact_and_the_whole_is_an_estimate(directory):
    model = ModelSettings(name="m", tokenizer=directory / "tokenizer.json")
    count = await counter().count(model, PROMPT)
    texts = encoded(directory, "plan") + encoded(directory, "name three rivers")
    assert count == (texts + 2 * 4, True, "tokenizer")


async def test_images_make_any_count_an_estimate(directory):
    model = ModelSettings(name="m", tokenizer=directory)
    message = Message("user", parts=(ImagePart("https://a/b.png"),))
    count = await counter().count(model, replace(PROMPT, messages=(message,)))
    assert count.estimated
    assert count.tokens > 500


async def test_a_long_prompt_is_counted_off_the_loop_and_the_same(directory):
    model = ModelSettings(name="m", tokenizer=directory)
    text = "name three rivers " * 20_000
    count = await counter().count(model, Prompt("m", (Message("user", text),)))
    assert count.tokens == encoded(directory, f"<s><|user|>{text}<|end|><|assistant|>")


async def test_a_tokenizer_that_cannot_be_read_is_told_once_and_replaced_by_an_estimate(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    model = ModelSettings(name="m", tokenizer=tmp_path)
    made = counter()
    for _ in range(2):
        count = await made.count(model, PROMPT)
        assert (count.estimated, count.by) == (True, "bytes")


async def test_limits_use_the_tokenizer_once_it_is_read_and_never_wait_for_it(directory):
    made = counter()
    model = ModelSettings(name="m", tokenizer=directory)
    assert (await made.at_hand(model, PROMPT)).by == "bytes"
    await made.count(model, PROMPT)
    assert (await made.at_hand(model, PROMPT)).by == "tokenizer"
    assert (await made.of_inputs(model, TEXTS)).by == "tokenizer"


async def test_over_the_wire_it_is_said_what_counted(tmp_path, directory):
    own = {**MODELS[0], "name": "own", "tokenizer": str(directory)}
    models = [*MODELS, own]
    async with inference_mesh(tmp_path, models=models) as rig:
        count = rig.mesh.inference.count_tokens
        assert (await count("name three rivers", model="own")).tokenizer == "tokenizer"
        asked = await count("four and four", model="small")
        assert asked == TokenCount(7, estimated=False, tokenizer="backend")
    async with inference_mesh(tmp_path, simulator={"counts_tokens": False}) as rig:
        for _ in range(2):
            asked = await rig.mesh.inference.count_tokens("four and four", model="small")
            assert asked == TokenCount(8, estimated=True, tokenizer="bytes")
        assert rig.simulator.load.by_path["/tokenize"] == 0
