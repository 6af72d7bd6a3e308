"""A new algorithm is one file and one row: this file is the file, `ROW` is the row."""

from dataclasses import dataclass, replace

import numpy
import pytest
import torch

from dllm.algorithms import ALGORITHMS, Algorithm
from dllm.config import ConfigError, GenerateSettings, Recipe, load_project
from dllm.core.batch import masked_inputs
from dllm.core.canvas import Completion
from dllm.core.corrupt import apply_mask
from dllm.language_model import load
from dllm.likelihood.scorer import LikelihoodScorer
from dllm.objectives.objective import Objective
from dllm.planning.cost import forwarded_tokens
from dllm.report.systems import algorithm_label
from dllm.sampling.sampler import Sampler
from dllm.training.trainer import train
from tests.training.conftest import metrics_of, run_config, workdir  # noqa: F401


@dataclass(frozen=True)
class AllMasked(Objective):
    """Predicts all targets of a row at once."""

    recipe: Recipe = Recipe()

    def corrupt(self, batch, noise, *, mask_id):
        one = torch.ones_like(noise.level)
        tokens = apply_mask(batch.tokens, batch.maskable, mask_id)
        return masked_inputs(batch, tokens, batch.maskable, one, one)


class AtOnce(Sampler):
    """Fills every mask with one token."""

    def denoise(self, backbone, canvas, settings, *, ended=None):
        yield canvas
        tokens = canvas.tokens.masked_fill(canvas.masked, backbone.eos_id + 7)
        done = torch.ones_like(canvas.done)
        yield replace(canvas, tokens=tokens, masked=torch.zeros_like(canvas.masked), done=done, step=1, nfe=1)

    def complete(self, backbone, canvas, settings, *, ended=None):
        *_, last = self.denoise(backbone, canvas, settings)
        for number, response in enumerate(last.responses()):
            yield Completion(number, response, 1, 0)


class Counted(LikelihoodScorer):
    """One nat per token."""

    def estimates(self, backbone, prompts, targets, settings, like=None, between=None):
        nats = numpy.array([float(len(target)) for target in targets])
        return nats, numpy.zeros((len(nats), 1)), numpy.ones(len(nats), dtype=int)

    def greedy_match(self, backbone, prompts, targets, settings):
        return [False] * len(targets)


ROW = Algorithm("toy", "all at once", AllMasked, AtOnce, Counted, recipe_allows={"normalisation": ("token",)})


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(ALGORITHMS, "toy", ROW)


def test_one_row_trains_samples_and_scores(workdir):  # noqa: F811
    train(run_config(algorithm="toy", steps=3), workdir, quiet=True)
    losses = [row["loss"] for row in metrics_of(workdir, "run") if row["split"] == "train"]
    assert len(losses) == 3 and losses[-1] < losses[0]
    model = load(workdir / "runs/run/model", device="cpu")
    assert model.algorithm is ROW
    prompt, settings = [6, 7, 8], GenerateSettings(max_new_tokens=4)
    (answer,) = model.answers([prompt], settings)
    assert answer.ids == (model.backbone.eos_id + 7,) * 4 and answer.passes == 1
    assert [*model.stream([prompt], settings)][-1].responses() == [list(answer.ids)]
    assert model.nelbo([prompt], [[9, 10]])[0].nats == 2.0 and model.greedy_match([prompt], [[9]]) == [False]


def test_one_row_without_a_part_is_refused_in_one_line(workdir, monkeypatch):  # noqa: F811
    monkeypatch.setitem(ALGORITHMS, "toy", replace(ROW, scorer=None, instead="sample it"))
    train(run_config(algorithm="toy", steps=1), workdir, quiet=True)
    with pytest.raises(ValueError, match="algorithm = 'toy' has no estimator of the likelihood; sample it"):
        load(workdir / "runs/run/model", device="cpu").nelbo([[6]], [[7]])


def test_config_plan_and_report_know_the_row():
    runs = {"runs": {"toy": {"like": "chat-base", "algorithm": "toy"}}}
    run = load_project("config", "config/laptop.yaml", runs).runs["toy"]
    assert forwarded_tokens(run, Recipe(), 20.0, 10.0) == 20.0 and algorithm_label("toy") == "all at once"
    runs["runs"]["toy"]["recipe"] = "published"
    with pytest.raises(ConfigError, match="algorithm = 'toy' allows `token` only: take another recipe"):
        load_project("config", "config/laptop.yaml", runs)
