"""Estimates of tokens, where the model's tokenizer is not at hand."""

from agent360.mesh.inference.answers import ReasoningPiece, TokenLogprob, ToolCallPiece
from agent360.mesh.inference.conversation import ImagePart, Message, Prompt, TextPart, Tool
from agent360.mesh.inference.tokens import (
    estimate_inputs,
    estimate_pieces,
    estimate_prompt,
    size_of,
)


def test_pieces_of_the_size_of_tokens_are_tokens():
    assert estimate_pieces([" stream", "ing", ReasoningPiece(" so"), ""]) == 3
    assert estimate_pieces([ToolCallPiece(0, "", "", '{"')] * 4) == 4


def test_pieces_too_large_for_tokens_count_by_their_bytes():
    assert estimate_pieces(["x" * 400, "y" * 40]) == 110
    assert estimate_pieces([]) == 0


def test_probabilities_tell_how_many_tokens_there_were():
    pieces = [" a whole sentence of text", *(TokenLogprob("t", -0.1) for _ in range(5))]
    assert estimate_pieces(pieces) == 5


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
