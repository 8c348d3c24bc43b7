"""Writes a tiny llama model with random weights: real to llama.cpp, meaningless to people."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import gguf
import numpy as np

DIMENSIONS: Final = 64
LAYERS: Final = 2
HEADS: Final = 4
KV_HEADS: Final = 2
FEED_FORWARD: Final = 128
CONTEXT_TOKENS: Final = 2048

_SPECIAL: Final = ("<unk>", "<s>", "</s>")
# No special tokens: llama.cpp's grammars begin with the generation prompt, as text.
_TEMPLATE: Final = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_tiny_model(path: Path, *, seed: int = 0) -> Path:
    """Writes the model (about half a megabyte) and returns its path.

    Its vocabulary is the 256 bytes, the printable ASCII characters and three special tokens.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny random llama")
    writer.add_context_length(CONTEXT_TOKENS)
    writer.add_embedding_length(DIMENSIONS)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(DIMENSIONS // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    vocabulary = _add_vocabulary(writer)
    _add_weights(writer, vocabulary, np.random.default_rng(seed))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: gguf.GGUFWriter) -> int:
    tokens = [
        *(token.encode() for token in _SPECIAL),
        *(f"<0x{byte:02X}>".encode() for byte in range(256)),
        "\u2581".encode(),
        *(bytes([letter]) for letter in range(ord("!"), ord("~") + 1)),
    ]
    kinds = [
        gguf.TokenType.UNKNOWN,
        *[gguf.TokenType.CONTROL] * (len(_SPECIAL) - 1),
        *[gguf.TokenType.BYTE] * 256,
    ]
    kinds += [gguf.TokenType.NORMAL] * (len(tokens) - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(place) for place in range(len(tokens))])
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(_TEMPLATE)
    return len(tokens)


def _add_weights(writer: gguf.GGUFWriter, vocabulary: int, random: np.random.Generator) -> None:
    def matrix(rows: int, columns: int) -> np.ndarray:
        return random.normal(0.0, 0.5, (rows, columns)).astype(np.float32)

    ones = np.ones(DIMENSIONS, dtype=np.float32)
    kv_width = DIMENSIONS // HEADS * KV_HEADS
    writer.add_tensor("token_embd.weight", matrix(vocabulary, DIMENSIONS))
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        writer.add_tensor(f"{block}.attn_norm.weight", ones)
        writer.add_tensor(f"{block}.attn_q.weight", matrix(DIMENSIONS, DIMENSIONS))
        writer.add_tensor(f"{block}.attn_k.weight", matrix(kv_width, DIMENSIONS))
        writer.add_tensor(f"{block}.attn_v.weight", matrix(kv_width, DIMENSIONS))
        writer.add_tensor(f"{block}.attn_output.weight", matrix(DIMENSIONS, DIMENSIONS))
        writer.add_tensor(f"{block}.ffn_norm.weight", ones)
        writer.add_tensor(f"{block}.ffn_gate.weight", matrix(FEED_FORWARD, DIMENSIONS))
        writer.add_tensor(f"{block}.ffn_up.weight", matrix(FEED_FORWARD, DIMENSIONS))
        writer.add_tensor(f"{block}.ffn_down.weight", matrix(DIMENSIONS, FEED_FORWARD))
    writer.add_tensor("output_norm.weight", ones)
    writer.add_tensor("output.weight", matrix(vocabulary, DIMENSIONS))
