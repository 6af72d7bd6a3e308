"""Small untrained models, whole: the loader, the algorithm, lm-eval's own adapter."""

import json

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from dllm.evaluation.evaluate import evaluate_benchmark

from .echo import evaluation, words_tokenizer


@pytest.fixture
def models(workdir):
    """runs/diffusion (a BERT) and runs/causal (a GPT-2) with the words tokenizer."""
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

    tokenizer = words_tokenizer()
    tokenizer.eos_token = "[PAD]"
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bert = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **small, **ids))
        gpt2 = GPT2LMHeadModel(
            GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=2, **ids)
        )
    for name, model in (("diffusion", bert), ("causal", gpt2)):
        directory = workdir / "runs" / name / "model"
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return workdir


def settings(name):
    kind = "hf" if name == "causal" else "dllm"
    return {"run": name, "checkpoint": f"runs/{name}/model", "model_kind": kind}


@pytest.mark.parametrize("name", ["diffusion", "causal"])
def test_a_real_model_answers_every_kind_of_task(models, name):
    for task in ("both", "last", "write"):
        result = evaluate_benchmark(evaluation(task, chat_template=True, **settings(name)), models)
        assert 0 <= result["metrics"][result["metric"]]["value"] <= 1
        rows = [json.loads(line) for line in (models / f"evals/{name}/{task}.samples.jsonl").read_text().splitlines()]
        assert len(rows) == result["n"] and all("<answer>" in row["prompt"] for row in rows)


def test_one_token_choices_of_a_question_share_their_forward_pass(models):
    result = evaluate_benchmark(evaluation("both", **settings("diffusion")), models)
    assert result["passes"] == 30


def test_shards_of_a_real_model_score_as_the_whole_up_to_rounding(models):
    config = evaluation("both", shots=1, **settings("diffusion"))
    path = models / "evals/diffusion/both.samples.jsonl"
    whole = evaluate_benchmark(config, models)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for stored in (models / ".work/answers").rglob("*.jsonl"):
        stored.unlink()
    for shard in range(2):
        evaluate_benchmark(config, models, shard=(shard, 2), score=False)
    merged = evaluate_benchmark(config, models, compute=False)
    for key in ("metrics", "passes", "subtasks", "inputs"):
        assert merged[key] == whole[key]
    for row, other in zip(rows, map(json.loads, path.read_text().splitlines()), strict=True):
        # float32 sums over another padding
        assert row.pop("log_likelihoods") == pytest.approx(other.pop("log_likelihoods"), abs=1e-5)
        assert row == other


def test_an_autoregressive_answer_is_as_long_as_ours_may_be(models):
    """The task asks for up to 999 tokens."""
    config = evaluation("write", generation={"max_new_tokens": 3}, **settings("causal"))
    evaluate_benchmark(config, models)
    for line in (models / "evals/causal/write.samples.jsonl").read_text().splitlines():
        assert len(words_tokenizer()(json.loads(line)["response"], add_special_tokens=False)["input_ids"]) <= 3


def test_numbers_do_not_move_with_the_token_budget_of_a_batch(models):
    """Rounding of float32 products over another number of rows is all that may differ."""
    path = models / "evals/diffusion/both.samples.jsonl"
    found = []
    for batch_tokens in (1, 100, 16384):
        likelihood = {"batch_tokens": batch_tokens, "estimator": "lattice", "budget": 5}
        result = evaluate_benchmark(
            evaluation("both", scorer={"likelihood": likelihood}, **settings("diffusion")), models
        )
        found.append((result, [json.loads(line) for line in path.read_text().splitlines()]))
    for result, rows in found[1:]:
        for key in ("metrics", "passes", "passes_per_document", "estimators", "subtasks", "inputs"):
            assert result[key] == found[0][0][key]
        for row, other in zip(rows, found[0][1], strict=True):
            assert row["log_likelihoods"] == pytest.approx(other["log_likelihoods"], abs=1e-5)


def test_a_record_says_what_the_answers_took_and_keeps_times_apart(models):
    config = evaluation("both", **settings("diffusion"))
    result = evaluate_benchmark(config, models)
    assert result["estimators"] == {"enumerate": 90} and result["standard_error_of_answers"] == 0
    assert (result["passes"], result["passes_per_document"]) == (30, 1)
    seconds = result["provenance"]["model_seconds"]
    assert seconds > 0
    again = evaluate_benchmark(config, models)  # from the store: the model was not asked, what it took is known
    assert again["provenance"]["model_seconds"] == seconds
    for record in (result, again):
        del record["provenance"], record["wall_seconds"]
    assert again == result
    chains = evaluate_benchmark(evaluation("write", **settings("diffusion")), models)
    assert chains["estimators"] == {} and chains["standard_error_of_answers"] is None
    assert 0 < chains["tokens_written"] <= 8 * chains["n"] and "tokens_written" not in result


def test_a_rolling_likelihood_takes_the_blocks_of_its_settings(models):
    """Blocks of one token are the left-to-right chain rule: exact, one pass a token."""
    likelihood = {"block_size": 1}
    config = evaluation("rolling", metric="word_perplexity", scorer={"likelihood": likelihood}, **settings("diffusion"))
    result = evaluate_benchmark(config, models)
    assert set(result["estimators"]) == {"enumerate"} and result["standard_error_of_answers"] == 0


def test_an_autoregressive_model_trained_here_reads_its_prompts_as_in_training(models):
    """A tokenizer made for encoders puts [CLS] and [SEP] around a text, which no prompt of training had."""
    from dllm.evaluation.causal import open_causal
    from dllm.models.tokenizers import encode_text

    directory = models / "runs/causal/model"
    model_of = {"precision": "fp32", "device": "cpu", "batch_size": 1}
    note = {"algorithm": "ar", "special_tokens": {"mask": "[MASK]", "eos": "[PAD]"}}
    tokenizer = words_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": "[PAD]"})
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("[CLS]", "[SEP]")}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=list(ids.items())
    )
    tokenizer.save_pretrained(directory)
    published = open_causal(str(directory), **model_of)
    assert published.tok_encode("w1 w2") == [ids["[CLS]"], *encode_text(tokenizer, "w1 w2"), ids["[SEP]"]]
    (directory / "dllm.json").write_text(json.dumps(note))
    ours = open_causal(str(directory), **model_of)
    assert ours.tok_encode("w1 w2") == encode_text(tokenizer, "w1 w2")
    assert ours.tok_batch_encode(["w1 w2"])[0][0].tolist() == encode_text(tokenizer, "w1 w2")


def test_an_autoregressive_model_reads_control_tokens_as_text_and_no_request_stops_the_others(models):
    from lm_eval.api.instance import Instance

    from dllm.config import GenerateSettings
    from dllm.evaluation.causal import CausalAnswerer, open_causal

    lm = open_causal(str(models / "runs/causal/model"), precision="fp32", device="cpu", batch_size=1)
    controls = {lm.tokenizer.convert_tokens_to_ids(token) for token in ("[MASK]", "[PAD]")}
    read = []
    lm.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"] if "input_ids" in kwargs else args[0]),
        with_kwargs=True,
    )
    answerer = CausalAnswerer(lm.tokenizer, lambda: lm, generation=GenerateSettings(max_new_tokens=1))

    def answers(kind, *arguments):
        requests = [Instance(kind, {}, args, 0, metadata=("task", i, 1)) for i, args in enumerate(arguments)]
        return [answer["answer"] for answer in answerer.answers(kind, requests)]

    spelt = answers("loglikelihood", ("w1 [MASK] w2", " w3 [PAD]"), ("[PAD]", " [MASK]"))
    answers("generate_until", ("w1 [MASK] [PAD]", {"until": ["w9"]}))
    assert all(value < 0 for value, _ in spelt) and read
    assert not any(controls & set(ids.flatten().tolist()) for ids in read)
    empty = answers("loglikelihood", ("", ""), (" ", "w1"), ("w1", ""), ("", "w1"))
    assert empty[0] == empty[2] == [0.0, True] and empty[1][0] < 0 and empty[3][0] < 0
    assert len(answers("generate_until", *[(text, {"until": ["w9"]}) for text in ("w1", "", " ")])) == 3
    with pytest.raises(ValueError, match="task, document 0: the continuation has 65 tokens, the model takes 64"):
        answers("loglikelihood", ("w1", " w1" * 65))
