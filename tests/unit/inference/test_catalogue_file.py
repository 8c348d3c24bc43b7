"""The catalogue's file: what is right is read, what is wrong is refused with line and field."""

from pathlib import Path

import pytest

from agent360.mesh.inference.catalogue_file import read_models
from agent360.mesh.runtime.watched_file import WrongFileError

GOOD = '[[models]]\nname = "small"\nbackends = ["gpu"]\n'


@pytest.mark.parametrize(
    ("text", "line", "fault"),
    [
        (GOOD + 'task_clases = ["simple"]', 4, "task_clases: is not known"),
        (GOOD + "weight = 0", 4, "weight: Input should be greater than 0; is 0"),
        (GOOD + "[models.limits]\nmax_prompt_tokens = -1", 5, "limits.max_prompt_tokens"),
        (GOOD + 'limits = { max_tokens = 7 }', 4, "limits.max_tokens"),
        (GOOD + "\n\n" + GOOD, 7, "more than one is named small"),
        (GOOD + '[[models]]\nname = "b"\nbackends = ["gpu", "tpu"]', 6, "unknown backends: tpu"),
        (GOOD + 'fallbacks = ["large"]', 4, "there is no model large"),
        (GOOD + 'fallbacks = ["small"]', 4, "cannot be its own fallback"),
        (GOOD + 'weights = { tpu = 2 }', 4, "not backends of small: tpu"),
        (GOOD + "[[models]]\nweight = 2\n", 4, "name: is missing"),
        ('[[models]]\nname = "auto"\nbackends = ["gpu"]', 2, "meaning of its own"),
        ('[[models]]\nname = "s\\nX: y"\nbackends = ["gpu"]', 2, "name: "),
        ("[plans]\n", 1, "'plans' is not known"),
        ('models = ["small"]\n', 1, "are written as"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_line_and_field(
    tmp_path: Path, text: str, line: int, fault: str
) -> None:
    file = tmp_path / "models.toml"
    file.write_text(text)
    with pytest.raises(WrongFileError, match=fault) as caught:
        read_models(file, ["gpu"])
    assert f"models.toml:{line}:" in str(caught.value)


@pytest.mark.parametrize("text", ["", "models = 7", "[[models]\n"])
def test_a_file_without_models_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "models.toml"
    file.write_text(text)
    with pytest.raises(WrongFileError, match=r"models\.toml"):
        read_models(file, ["gpu"])


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WrongFileError, match="No such file"):
        read_models(tmp_path / "models.toml", ["gpu"])


def test_a_file_may_say_everything(tmp_path: Path) -> None:
    file = tmp_path / "models.toml"
    file.write_text(
        '[[models]]\nname = "small"\nbackends = ["gpu", "tpu"]\nupstream_model = "llama-8b"\n'
        'capabilities = ["chat", "tools"]\ntask_classes = ["simple"]\ncontext_tokens = 8192\n'
        "max_tokens = 512\ninput_usd_per_million = 0.1\noutput_usd_per_million = 0.4\n"
        'quantization = "Q4_K_M"\ntenants = ["acme"]\npolicy = "two_choices"\n'
        'affinity = "prefix"\nweight = 2\nwarm_up = "Hello"\nfallbacks = ["large"]\n'
        "[models.weights]\ngpu = 3\n[models.limits]\nmax_prompt_tokens = 4096\n"
        '[[models]]\nname = "large"\nbackends = ["tpu"]\n'
    )
    small, large = read_models(file, ["gpu", "tpu"])
    assert (small.upstream_name, small.weight_of("gpu"), small.weight_of("tpu")) == (
        "llama-8b",
        3.0,
        1.0,
    )
    assert (small.fallbacks, small.limits.max_prompt_tokens) == (("large",), 4096)
    assert large.name == "large"
