"""What can be set of a model that runs in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from agent360.mesh.runtime.settings import Settings
from agent360.mesh.runtime.validation import PRINTABLE

Pooling = Literal["mean", "cls", "last"]


class LocalEngineSettings(Settings):
    """A GGUF file that llama.cpp runs in this process; needs the extra ``local``.

    Example:
        >>> LocalEngineSettings(name="local", path=Path("qwen3-4b-q4_k_m.gguf"), parallel=4)
    """

    name: str = Field(default="local", pattern=PRINTABLE, max_length=128)
    """Names the backend in answers, logs and metrics."""
    path: Path
    """The model: a GGUF file of any quantisation."""
    model: str = ""
    """The name under which it is listed; empty: the file's name without ``.gguf``."""
    parallel: int = Field(default=4, ge=1, le=256)
    """Answers that are generated at the same time, in one continuous batch."""
    context_tokens: int = Field(default=4096, ge=64)
    """Most tokens of prompt and answer together, of each of them."""
    threads: int = Field(default=0, ge=0)
    """Threads that compute; 0: as many as there are cores, less one for all the rest."""
    gpu_layers: int = Field(default=0, ge=0)
    """Layers that run on a GPU, where llama.cpp was built for one."""
    flash_attention: Literal["auto", "on", "off"] = "auto"
    """Whether attention is computed in one kernel; auto: with ``gpu_layers`` only, because on a
    processor it is slower."""
    embeddings: bool = False
    """Whether it makes vectors; it does not chat then."""
    pooling: Pooling = "mean"
    """How the vectors of a text's tokens become one."""
    warm_up: bool = True
    """Whether an empty run loads the weights into memory when the engine starts."""

    @property
    def listed_as(self) -> str:
        """The name under which the model is listed."""
        return self.model or self.path.name.removesuffix(".gguf")
