"""The demo in examples/: a short run, and what it reports when something goes wrong."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import gradclip_ext

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = ["no clipping", "torch.nn.utils", "gradclip_ext"]
STEPS = 30
# So small that nearly every step is clipped.
MAX_NORM = 0.1
SMALL = ["--steps", str(STEPS), "--hidden", "48", "--characters", "1500"]
SMALL += ["--max-norm", str(MAX_NORM)]


@pytest.fixture
def char_rnn(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(EXAMPLES))
    # On a busy machine two threads would wait for each other.
    torch.set_num_threads(1)
    yield importlib.import_module("char_rnn")
    torch.set_num_threads(threads)


@pytest.fixture
def report(char_rnn: ModuleType) -> ModuleType:
    return importlib.import_module("char_rnn_report")


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, Path]:
    """The exit code of a short run, what it printed, and the folder with its files."""
    folder = tmp_path_factory.mktemp("demo")
    threads = torch.get_num_threads()
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.syspath_prepend(str(EXAMPLES))
        code = importlib.import_module("char_rnn").main([*SMALL, "--out", str(folder)])
    torch.set_num_threads(threads)
    return code, output.getvalue(), folder


def test_short_run_measures_three_comparable_runs(short_run: tuple[int, str, Path]) -> None:
    code, _, folder = short_run
    assert code == 0
    content = json.loads((folder / "char_rnn.json").read_text())
    assert content["options"]["steps"] == STEPS
    assert content["agreement"]["agrees"] is True
    same_gradients = content["agreement"]["same_gradients_difference"]
    assert 0 < same_gradients["gradclip_ext"] < 1e-6
    assert 0 < same_gradients["torch.nn.utils"] < 1e-4
    runs = content["runs"]
    assert list(runs) == NAMES
    unclipped, reference, extension = runs.values()
    for run in runs.values():
        assert len(run["losses"]) == len(run["gradient_norms"]) == STEPS
        mean_loss = sum(run["losses"]) / STEPS
        assert run["final_perplexity"] == pytest.approx(math.exp(mean_loss))
        assert run["largest_gradient_norm"] == max(run["gradient_norms"])
        # Almost no initial preference for any character: the loss of guessing.
        assert run["losses"][0] == pytest.approx(math.log(27), abs=0.01)
        assert run["losses"][-1] < 3.2
        # All runs start the same.
        assert run["losses"][0] == unclipped["losses"][0]
        assert run["gradient_norms"][0] == pytest.approx(unclipped["gradient_norms"][0])
    assert extension["losses"] == pytest.approx(reference["losses"], rel=1e-4)
    assert extension["losses"][-1] != pytest.approx(unclipped["losses"][-1], rel=1e-3)
    for run in (reference, extension):
        clipped = sum(norm > MAX_NORM for norm in run["gradient_norms"])
        assert clipped > STEPS / 2
        assert run["clipped_share"] == clipped / STEPS
        assert 0 < run["clipping_milliseconds_median"] < 100
    assert unclipped["clipped_share"] is None


def test_short_run_prints_a_table(short_run: tuple[int, str, Path]) -> None:
    _, output, _ = short_run
    table = [line for line in output.splitlines() if line.endswith("never")]
    assert [line[:14].strip() for line in table] == NAMES
    assert "torch.nn.utils and gradclip_ext agree." in output


def test_figure_shows_every_run(short_run: tuple[int, str, Path]) -> None:
    _, _, folder = short_run
    image = importlib.import_module("matplotlib.image").imread(folder / "char_rnn.png")
    height, width, _ = image.shape
    assert width > 1000
    assert height > 400
    pixels = torch.from_numpy(image[..., :3])
    for colour in ("D55E00", "56B4E9", "000000"):
        rgb = torch.tensor(list(bytes.fromhex(colour))) / 255
        assert int((pixels - rgb).abs().amax(dim=-1).lt(0.02).sum()) > 200


def test_run_starts_the_same_with_the_same_seed_only(char_rnn: ModuleType) -> None:
    text = char_rnn.encode(char_rnn.read_text(1500))

    def losses(seed: int) -> list[float]:
        options = char_rnn.parse_arguments(["--hidden", "16", "--steps", "3", "--seed", str(seed)])
        return char_rnn.train("run", gradclip_ext.clip_grad_norm_, text, options).losses

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def test_wrong_clipping_is_noticed(
    char_rnn: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def clips_too_much(parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, 0.99 * max_norm)

    monkeypatch.setattr(gradclip_ext, "clip_grad_norm_", clips_too_much)
    assert char_rnn.main([*SMALL, "--out", str(tmp_path)]) == 1
    assert "DO NOT AGREE" in capsys.readouterr().out


def test_run_stops_where_the_loss_is_not_finite(
    char_rnn: ModuleType, report: ModuleType, tmp_path: Path
) -> None:
    def ruins_gradients(parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
        for parameter in parameters:
            parameter.grad.fill_(math.inf)
        return torch.tensor(math.inf)

    text = char_rnn.encode(char_rnn.read_text(1500))
    options = char_rnn.parse_arguments(["--hidden", "16", "--steps", "5"])
    ruined = char_rnn.train(NAMES[0], ruins_gradients, text, options)
    assert len(ruined.losses) == 2
    assert ruined.blow_up_step(loss_limit=100.0) == 2

    # The stopped run is reported next to two complete ones, in every form.
    others = [
        char_rnn.train(name, gradclip_ext.clip_grad_norm_, text, options) for name in NAMES[1:]
    ]
    differences = {name: [1e-7] for name in NAMES[1:]}
    comparison = report.Comparison(ruined, *others, 1.0, 27, differences)
    assert comparison.agrees
    assert any(
        line.startswith("no clipping") and line.split()[-1] == "2"
        for line in report.summary(comparison).splitlines()
    )
    report.save_figure(comparison, tmp_path / "figure.png")
    report.save_json(comparison, {}, tmp_path / "numbers.json")
    saved = json.loads((tmp_path / "numbers.json").read_text())["runs"]["no clipping"]
    assert saved["losses"][1] is None
    assert saved["largest_gradient_norm"] is None


def test_disagreement_is_not_hidden_by_not_a_number(report: ModuleType) -> None:
    def agrees(losses: list[float], difference_of_clips: float = 1e-7) -> bool:
        norms = [0.5] * len(losses)
        unclipped, reference, extension = (
            report.Run(name, run_losses, norms, norms)
            for name, run_losses in zip(NAMES, [[3.0], [3.0, 2.0], losses], strict=True)
        )
        differences = {"torch.nn.utils": [0.0, 0.0], "gradclip_ext": [difference_of_clips, 0.0]}
        comparison = report.Comparison(unclipped, reference, extension, 1.0, 27, differences)
        return comparison.agrees

    assert agrees([3.0, 2.0])
    assert not agrees([3.0, 2.1])
    assert not agrees([3.0, math.nan])
    assert not agrees([math.nan, 2.0])
    assert not agrees([3.0])
    assert not agrees([3.0, 2.0], difference_of_clips=1e-5)
    assert not agrees([3.0, 2.0], difference_of_clips=math.nan)


def test_single_losses_are_compared_until_shortly_after_the_first_clip(report: ModuleType) -> None:
    def comparison(extension_losses: list[float]) -> object:
        norms = [0.5] * 19 + [1.5] * 31
        reference, extension = (
            report.Run(name, losses, norms, norms)
            for name, losses in zip(NAMES[1:], [[3.0] * 50, extension_losses], strict=True)
        )
        differences = {name: [0.0] for name in NAMES[1:]}
        return report.Comparison(reference, reference, extension, 1.0, 27, differences)

    early = comparison([3.0] * 29 + [2.9] + [3.0] * 20)
    late = comparison([3.0] * 30 + [2.9] + [3.0] * 19)
    trend = comparison([3.0] * 30 + [2.7] * 20)
    assert early.compared_steps == late.compared_steps == 30
    assert not early.agrees
    assert late.agrees
    assert late.largest_loss_difference() == pytest.approx(0.1 / 3)
    assert trend.loss_difference == 0
    assert trend.mean_loss_difference == pytest.approx(0.04)
    assert not trend.agrees


@pytest.mark.parametrize(
    "arguments", [["--steps", "0"], ["--threads", "0"], ["--characters", "1000"]]
)
def test_impossible_options_are_refused(char_rnn: ModuleType, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        char_rnn.main(arguments)
    assert refusal.value.code == 2


@pytest.mark.parametrize("characters", [1155, 3000])
def test_batches_continue_the_text(char_rnn: ModuleType, characters: int) -> None:
    text = torch.arange(characters)
    batches = char_rnn.sequential_batches(text, torch.Generator().manual_seed(0))
    previous = None
    for _ in range(10):
        inputs, targets, epoch_begins = next(batches)
        assert inputs.shape == targets.shape == (32, 35)
        assert torch.equal(targets, inputs + 1)
        if not epoch_begins:
            assert torch.equal(inputs[:, 0], previous[:, -1] + 1)
        previous = inputs
