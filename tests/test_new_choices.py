"""A new reveal rule, estimator or kind of rows is one function and one row, a new schedule one row."""

import pytest
import torch

from dllm.choices import ESTIMATORS, REVEAL_RULES, ROW_KINDS, Estimator, RevealRule
from dllm.config import DatasetEntry, GenerateSettings, LikelihoodSettings, Recipe
from dllm.core.canvas import canvas_for
from dllm.core.corrupt import corrupted
from dllm.data.convert import messages_of
from dllm.data.kinds import Kind, recognised
from dllm.likelihood.designs import Design
from dllm.likelihood.policy import likelihood_passes
from dllm.likelihood.scorer import MaskedScorer
from dllm.sampling.sampler import MaskedSampler
from dllm.schedules import SCHEDULES, Schedule
from tests.oracles import tabular_backbone


def rightmost(logits, confidence, noise):
    """Later positions first."""
    return torch.arange(len(logits)).float()


def all_masked_once(length, key, settings):
    """One pass with everything masked, each token counted once."""
    masked = torch.ones(*key.shape, 1, length, dtype=torch.bool)
    return Design(masked, masked.double(), torch.zeros(1, dtype=torch.long))


def test_one_row_is_a_reveal_rule_of_settings_and_sampler(monkeypatch):
    with pytest.raises(ValueError, match="Input should be 'confidence', .* or 'entropy_bound'"):
        GenerateSettings(reveal_rule="rightmost")
    monkeypatch.setitem(REVEAL_RULES, "rightmost", RevealRule(rightmost))
    settings, backbone = GenerateSettings(reveal_rule="rightmost", early_stop=False), tabular_backbone(3, 0)
    start = canvas_for([[0]], 3, mask_id=backbone.mask_id, pad_id=backbone.pad_id)
    masked = [canvas.masked[0, 1:].tolist() for canvas in MaskedSampler().denoise(backbone, start, settings)]
    assert masked == [[True, True, True], [True, True, False], [True, False, False], [False, False, False]]


def test_one_row_is_an_estimator_of_settings_scorer_and_planning(monkeypatch):
    monkeypatch.setitem(ESTIMATORS, "once", Estimator(all_masked_once, lambda length, settings: 1.0))
    settings, backbone = LikelihoodSettings(estimator="once"), tabular_backbone(3, 0)
    score = MaskedScorer().nelbo(backbone, [[0]], [[1, 2]], settings)[0]
    assert score.passes == 1 == likelihood_passes(2, settings) and score.nats > 0
    monkeypatch.setitem(ESTIMATORS, "once", Estimator(all_masked_once))
    assert likelihood_passes(2, settings) == settings.budget


def test_one_row_is_a_schedule_of_recipes(monkeypatch):
    monkeypatch.setitem(SCHEDULES, "half", Schedule(lambda t: 1 - t / 2, lambda t: -torch.ones_like(t) / 2))
    recipe = Recipe(schedule="half", corruption="bernoulli")
    maskable, noise = torch.ones(1, 100, dtype=torch.bool), torch.linspace(0, 0.99, 100)[None]
    assert corrupted(maskable, torch.ones(1), noise, recipe).masked.sum() == 50


def test_one_row_is_a_kind_of_datasets(monkeypatch):
    def turns(row, where):
        return [{"role": "user", "content": row["riddle"]}, {"role": "assistant", "content": row["solution"]}]

    with pytest.raises(ValueError, match="Input should be 'auto', .* or 'text'"):
        DatasetEntry(files=["riddles.jsonl"], kind="riddles")
    riddles = Kind("riddles", lambda row: ("riddle", "solution") if "riddle" in row else (), turns)
    monkeypatch.setitem(ROW_KINDS, "riddles", riddles)
    assert DatasetEntry(files=["riddles.jsonl"], kind="riddles").kind == "riddles"
    row = {"riddle": "What has keys and no locks?", "solution": "A piano."}
    assert recognised([row], "riddles.jsonl") == ("riddles", "rows look like riddles: columns riddle, solution")
    assert messages_of(row, "auto", "riddles.jsonl:1")[-1]["content"] == "A piano."
