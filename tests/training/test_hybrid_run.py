"""A run of hybrid diffusion, from end to end."""

import pytest

import dllm
from dllm.algorithms import algorithm_named
from dllm.config import ConfigError, GenerateSettings, LikelihoodSettings, load_project
from dllm.models.load import read_sidecar
from dllm.training.trainer import train
from tests.training.conftest import metrics_of, run_config


def test_a_run_learns_and_its_checkpoint_samples_and_scores_by_its_own_noise(workdir):
    train(run_config(algorithm="hybrid", uniform_share=0.3, steps=40), workdir, quiet=True)
    losses = [row["loss"] for row in metrics_of(workdir, "run") if row["split"] == "eval"]
    assert losses[-1] < losses[0]
    directory = workdir / "runs/run/model"
    assert read_sidecar(directory)["uniform_share"] == 0.3
    model = dllm.load(directory, device="cpu")
    assert model.algorithm is algorithm_named("hybrid")
    prompt, settings = [6, 7, 8], GenerateSettings(max_new_tokens=6, early_stop=False)
    (answer,) = model.answers([prompt], settings)
    (response,) = [*model.stream([prompt], settings)][-1].responses()
    assert answer.passes == 6 and response[: len(answer.ids)] == list(answer.ids)
    (score,) = model.nelbo([prompt], [[9, 10, 11]], LikelihoodSettings(budget=16))
    assert score.passes == 16 and score.standard_error > 0
    # it has seen masks, and so it is also sampled by them
    masked = dllm.load(directory, device="cpu", algorithm="mdlm")
    assert masked.answers([prompt], GenerateSettings(max_new_tokens=6, reveal_rule="entropy"))[0].passes <= 6


def test_the_share_of_an_evaluation_without_random_tokens_is_masked_diffusion(workdir):
    """The two algorithms see the same masks and have the same losses, up to the order of sums."""
    for name, changes in {"ours": {"algorithm": "hybrid", "uniform_share": 0.0}, "masked": {}}.items():
        train(run_config(name, steps=3, **changes), workdir, quiet=True)
    first = [metrics_of(workdir, name)[0]["loss"] for name in ("ours", "masked")]
    # the mask token may take a share of the probability in `mdlm`, and none here
    assert first[0] == pytest.approx(first[1], rel=0.05)


def test_a_recipe_with_another_weight_is_refused_in_one_line():
    runs = {
        "runs": {"toy": {"like": "chat-base", "algorithm": "hybrid", "recipe": "flat"}},
        "recipes": {"flat": {"like": "corrected", "weight": "uniform"}},
    }
    with pytest.raises(ConfigError, match="algorithm = 'hybrid' allows `elbo` only: take another recipe"):
        load_project("config", "config/laptop.yaml", runs)
