"""Estimates of tokens, where the model's tokenizer is not at hand."""

from agent360.mesh.inference.conversation import ImagePart, Message, Prompt, TextPart, Tool
from agent360.mesh.inference.tokens import estimate_inputs, estimate_prompt, size_of


def test_four_bytes_are_a_token_and_a_message_costs_four_more():
    prompt = Prompt(model="m", messages=(Message("user", "x" * 40), Message("user", "y")))
    assert estimate_prompt(prompt) == (4 + 10) + (4 + 1)


def test_letters_of_other_scripts_count_by_their_bytes():
    assert size_of("日本語") == 9
    assert estimate_inputs(["日本語", ""]) == 3


def test_tools_and_images_are_counted():
    bare = Prompt(model="m", messages=(Message("user", parts=(TextPart("what"),)),))
    image = Prompt(
        model="m", messages=(Message("user", parts=(TextPart("what"), ImagePart("data:,"))),)
    )
    tool = Prompt(
        model="m", messages=bare.messages, tools=(Tool("look", parameters={"type": "object"}),)
    )
    assert estimate_prompt(image) - estimate_prompt(bare) == 765
    assert estimate_prompt(tool) > estimate_prompt(bare)
