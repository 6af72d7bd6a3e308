"""The benchmark's own promises: pairs in turn, honest verdicts, alternatives that compute what ours compute."""

import contextlib
import gc
import io
import json

import pytest
import torch

from bench.__main__ import main
from bench.alternatives import masked_loss, masked_loss_selected, monte_carlo, sample_batch
from bench.cases import CASES
from bench.measure import compare, growth, interleaved, quartiles, require
from bench.options import Options
from bench.page import verdict
from bench.revising import FEW, bound, repeated
from bench.workloads import chat_lengths, encoder, laptop
from dllm.algorithms import algorithm_named
from dllm.config import GenerateSettings, LikelihoodSettings
from dllm.core.canvas import canvas_for
from dllm.language_model import Answer, DiffusionLM
from dllm.likelihood.scorer import MaskedScorer
from dllm.sampling.sampler import MaskedSampler
from tests.training_loss import dense_masked_loss

FACTS = {"name": "work", "against": "other", "held_equal": "all", "correct": "yes"}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """Before each job that is timed garbage is collected, which is not looked for in all that pytest has loaded."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def backbone():
    return encoder(40, layers=2, width=64, context=96)


def test_both_sides_run_in_turn_and_the_warm_up_is_not_counted():
    calls = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert [len(taken) for taken in times.values()] == [3, 3]


def test_a_slow_comparison_stops_early_but_not_before_three_rounds():
    times = interleaved({"a": lambda: None}, repeats=50, at_most=0.0)
    assert len(times["a"]) == 3


def test_a_ratio_is_of_medians_and_its_spread_of_the_pairs():
    row = compare([1.0, 2.0, 4.0], [4.0, 10.0, 12.0], target=4.9, **FACTS)
    assert row.ratio == 5.0
    assert (row.low, row.high) == quartiles([4.0, 5.0, 3.0]) == (3.5, 4.5)
    assert row.verdict == "reached"
    assert compare([1.0], [4.0], target=5.0, **FACTS).verdict == "missed"
    assert compare([1.0], [4.0], **FACTS).verdict == ""


def test_samples_that_are_no_pairs_are_refused():
    with pytest.raises(ValueError, match="work: 2 samples of ours and 1 of theirs"):
        compare([1.0, 2.0], [1.0], **FACTS)


def test_growth_keeps_the_lines_apart():
    labels = {"name": "g", "title": "g", "x_label": "x", "y_label": "y"}
    curve = growth({1: {"ours": [1.0, 3.0], "b": [5.0, 5.0]}, 2: {"ours": [2.0, 2.0], "b": [9.0, 7.0]}}, **labels)
    assert curve.x == [1, 2]
    assert curve.lines == {"ours": [2.0, 2.0], "b": [5.0, 8.0]}


def test_a_comparison_whose_results_differ_ends_without_a_number():
    with pytest.raises(AssertionError, match="not so: same loss"):
        require(False, "same loss")


def test_the_common_sampler_gives_the_tokens_of_ours(backbone):
    prompts = [[7, 8, 9], list(range(10, 22))]
    settings = GenerateSettings(max_new_tokens=16, block_size=8, early_stop=False)
    canvas = canvas_for(prompts, 16, mask_id=backbone.mask_id, pad_id=backbone.pad_id)
    *_, last = MaskedSampler().denoise(backbone, canvas, settings)
    ids = backbone.mask_id, backbone.pad_id
    assert last.responses() == sample_batch(backbone.model, prompts, 16, 8, *ids)
    assert last.responses() == [sample_batch(backbone.model, [prompt], 16, 8, *ids)[0] for prompt in prompts]


def test_the_common_estimator_has_the_expectation_of_ours(backbone):
    prompt, target = [7, 8, 9], [11, 12]
    generator = torch.Generator().manual_seed(0)
    drawn = [
        monte_carlo(backbone.model, prompt, target, backbone.mask_id, draws=32, generator=generator) for _ in range(60)
    ]
    exact = MaskedScorer().nelbo(backbone, [prompt], [target], LikelihoodSettings(estimator="enumerate"))[0].nats
    mean, error = torch.tensor(drawn).mean(), torch.tensor(drawn).std() / 60**0.5
    assert abs(mean - exact) < 4 * error + 1e-3  # four standard errors: one false alarm in 16,000


@pytest.mark.parametrize("common", [masked_loss, masked_loss_selected])
def test_the_common_loss_is_the_textbook_loss(backbone, common):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 40, (3, 12), generator=generator)
    attention = torch.arange(12) < torch.tensor([12, 7, 9])[:, None]
    masked = (torch.rand(3, 12, generator=generator) < 0.5) & attention
    share = torch.tensor([1.0, 2.0, 0.5])
    corrupted = torch.where(masked, backbone.mask_id, tokens)
    logits = backbone.model(input_ids=corrupted, attention_mask=attention.long()).logits
    expected = dense_masked_loss(logits, tokens, masked, share)
    found = common(backbone.model, tokens, attention, masked, share, backbone.mask_id)
    assert torch.allclose(found, expected, rtol=1e-5)  # two orders of summation in fp32


def test_chat_lengths_have_the_mean_they_were_asked_for():
    lengths = chat_lengths(20_000)
    assert lengths.max() == 1024
    assert 335 < lengths.mean() < 345  # clipping at 1024 takes 10 off the 350


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """(results directory, what was printed) of a smoke run without a trained model."""
    out, said = tmp_path_factory.mktemp("smoke"), io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(["letters", "generation", "serving", "gpu", "--quick", "--threads", "1", "--out", str(out)]) == 0
    return out, said.getvalue()


def test_a_smoke_run_writes_results_and_a_page_without_a_trained_model(smoke):
    out, said = smoke
    found = json.loads((out / "letters.json").read_text())
    assert found["quick"] and found["rows"][0]["ratio"] == 32  # 4 letters x 8 draws for one forward
    assert {"hardware", "commit", "versions", "threads"} <= found["rows"][0].keys()
    assert "Smoke run." in (out / "index.html").read_text()
    assert {"rows.csv", "ratios.svg", "ratios.png", "growth.csv"} <= {p.name for p in out.iterdir()}
    assert "One-letter answers" in said


def test_a_missed_target_is_said_and_is_no_failure(smoke, tmp_path, capsys):
    path = tmp_path / "letters.json"
    found = json.loads((smoke[0] / "letters.json").read_text())
    found["rows"][0]["target"] = 1e9
    path.write_text(json.dumps(found))
    assert main(["--page", "--out", str(tmp_path)]) == 0
    assert verdict(found["rows"][0]) == "missed"
    assert "missed (at least 1e+09)" in capsys.readouterr().out
    assert 'does-not-hold">missed' in (tmp_path / "index.html").read_text()


def test_an_unknown_case_is_named_in_one_line(capsys):
    assert main(["leters"]) == 2
    assert capsys.readouterr().err.startswith("'leters' is not a case of the benchmark; allowed: letters, endings")


def test_cases_are_listed(capsys):
    assert main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(CASES)


def test_a_missing_laptop_run_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="no runs/chat-large/model there"):
        laptop(Options(tmp_path, workdir=tmp_path))


def test_a_smoke_run_of_samplers_that_revise_is_drawn_without_a_trained_model(tmp_path):
    assert main(["revising", "policy", "--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "revising.json").read_text())["setup"]["answers"]
    assert {row["way"] for row in rows} == set(FEW)
    assert all(row["bound"] > 0 and 0 <= row["repeated"] <= 1 and row["passes"] > 0 for row in rows)
    assert "Samplers that revise" in (tmp_path / "index.html").read_text()
    assert {"revising.svg", "revising.png", "revising.csv"} <= {p.name for p in tmp_path.iterdir()}
    assert json.loads((tmp_path / "policy.json").read_text())["skipped"]


def test_the_bound_of_answers_is_per_token_and_of_their_own_prompts(backbone):
    model, one, other = DiffusionLM(backbone, algorithm_named("mdlm")), ([7, 8], (11, 12, 13)), ([9], (14,))
    exact = LikelihoodSettings(estimator="enumerate")
    nats = [score.nats for score in model.nelbo([one[0], other[0]], [one[1], other[1]], exact)]
    assert bound(model, [one, other]) == pytest.approx(sum(nats) / 4, rel=0.02)  # 16 passes for 7 masked sets
    assert bound(model, []) is None


def test_repetitions_are_counted_within_answers():
    answers = [Answer("", 3, 1, ids=(5, 5, 6)), Answer("", 2, 1, ids=(6, 6)), Answer("", 1, 1, ids=(6,))]
    assert repeated(answers) == pytest.approx(2 / 3)
