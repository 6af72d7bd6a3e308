"""Exports: other tools load them and compute what the run computes, and the card says where they come from."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import dllm
from dllm.chat.settings import chat_context, chat_generation
from dllm.cli.main import main
from dllm.config import AdapterSettings, load_project
from dllm.exporting.export import export, is_export
from dllm.models.edit_heads import new_edit_heads, save_edit_heads
from dllm.models.load import load_backbone, save_stand_in
from dllm.models.published import family_of, published_config, read_tensors
from dllm.models.rotary import stock_rotary
from dllm.models.tokenizers import load_tokenizer
from dllm.provenance import directory_digest, write_record
from dllm.training.trainer import train
from tests.models.test_stand_ins import small
from tests.training.conftest import entry_for, make_model, run_config

TOKENS = [[5, 6, 7, 4, 4, 9, 10, 4], [8, 4, 11, 5, 4, 4, 6, 4]]
HERE = Path(__file__).parent
ADAPTER = AdapterSettings(kind="lora", rank=4, alpha=8)


def trained(workdir, kind="bert", *, name="run", **changes) -> Path:
    """The model of a short run from a new stock model."""
    entry = entry_for(kind).model_copy(update={"prediction": changes.pop("prediction", "in_place")})
    make_model(workdir / "downloads/start", entry)
    settings = {"model": entry, "init": "start", "init_path": "downloads/start", "steps": 2} | changes
    return train(run_config(name, **settings), workdir, quiet=True) / "model"


def elsewhere(jobs: list[dict], out: Path) -> list[tuple[torch.Tensor, str]]:
    """Logits of exports, and what the programs of their cards print, in a process without dllm; it starts slowly."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", HERE / "stock_logits.py", json.dumps(jobs), out],
        capture_output=True, text=True, env=environment, cwd=HERE.anchor,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(out)


def livelier(model: Path) -> Path:
    """A model whose weights were shaken: what two steps of training leave says nothing but EOS."""
    stock = load_backbone(model).model
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    stock.save_pretrained(model)
    return model


def logits(backbone) -> torch.Tensor:
    """As the stock class computes them."""
    with torch.no_grad(), stock_rotary():
        return backbone.model(input_ids=torch.tensor(TOKENS)).logits


RUNS = {
    "bert": ("bert", {}),
    "modernbert": ("modernbert", {"algorithm": "mlm"}),
    "modernbert-lora": ("modernbert", {"adapter": ADAPTER}),
    "roberta-blocks": ("roberta", {"recipe": {"response_end": "block", "block_size": 4}}),
    "llama-next": ("llama", {"prediction": "next"}),
    "llama-lora": ("llama", {"prediction": "next", "adapter": ADAPTER}),
}


@pytest.fixture(scope="module")
def stand_ins():
    models = load_project("config", "config/laptop.yaml", "config/systems.yaml").models
    return {entry.published: small(entry) for entry in models.values() if entry.published}


def test_stock_transformers_computes_the_same_and_samples_the_same_without_dllm(workdir, stand_ins, tmp_path):
    """Equal to the last bit: it is the same code, weights and tokens. (Ours samples from a packed forward, which sums
    in another order; the texts agree as long as no two tokens are equally sure.) A published checkpoint is exported as
    its stock class."""
    question = "who likes the sun ?"
    models, jobs = {}, []
    for name, (kind, changes) in RUNS.items():
        models[name] = livelier(trained(workdir, kind, name=name, **changes))
        there = export(models[name])
        assert there == workdir / f"exports/{name}-transformers" and is_export(there)
        auto = "AutoModelForCausalLM" if kind == "llama" else "AutoModelForMaskedLM"
        jobs.append({"directory": str(there), "auto": auto, "tokens": TOKENS, "question": question})
    save_stand_in(stand_ins["LLaDA"], load_tokenizer(workdir / "downloads/toy-model"), tmp_path / "llada")
    llada = export(tmp_path / "llada", output=tmp_path / "out")
    jobs.append({"directory": str(llada), "auto": "AutoModelForCausalLM", "tokens": TOKENS, "question": None})
    *found, (of_llada, _) = elsewhere(jobs, tmp_path / "found.pt")
    assert torch.equal(of_llada, logits(load_backbone(tmp_path / "llada")))
    assert dllm.load(llada).backbone.sidecar == dllm.load(tmp_path / "llada").backbone.sidecar
    for (name, model), job, (computed, said) in zip(models.items(), jobs[:-1], found, strict=True):
        lm = dllm.load(model)
        assert torch.equal(computed, logits(lm.backbone)), name
        sidecar = lm.backbone.sidecar
        settings = chat_generation(sidecar, chat_context(sidecar, lm.max_length))
        turns = [{"role": "user", "content": question}]
        assert said == lm.generate([turns], settings)[0] and said, name
        assert dllm.load(job["directory"]).generate([turns], settings) == [said]


@pytest.mark.parametrize("name", ["LLaDA", "LLaDA-MoE", "LLaDA2", "Dream", "RND1"])
def test_a_trained_model_of_a_family_is_exported_as_the_family_was_published(workdir, stand_ins, name):
    entry, base = stand_ins[name], workdir / "downloads/base"
    save_stand_in(entry, load_tokenizer(workdir / "downloads/toy-model"), base)
    config = published_config(base) | {"auto_map": {"AutoModel": "modeling.Model", "AutoConfig": "a/b--config.Config"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "manifest.json").write_text(json.dumps({"hub": "authors/base", "commit": "1" * 40, "licence": "mit"}))
    write_record(base, kind="model", name="base", config_digest="", inputs={})
    settings = {"model": entry, "init": "base", "init_path": "downloads/base", "steps": 2}
    settings["recipe"] = {"response_end": "block"} if name == "LLaDA2" else {}
    model = train(run_config(algorithm="bd3lm" if name == "LLaDA2" else "mdlm", **settings), workdir, quiet=True)
    there = export(model / "model", "published")
    again = load_backbone(there)
    before, after = dict(read_tensors(base)), dict(read_tensors(there))
    assert family_of(there).name == name and {k: v.shape for k, v in before.items()} == {
        k: v.shape for k, v in after.items()
    }
    assert any(not torch.equal(before[key], after[key]) for key in before), "it was trained"
    assert torch.equal(logits(again), logits(load_backbone(model / "model")))
    assert published_config(there) == config | {
        "auto_map": {"AutoModel": "authors/base--modeling.Model", "AutoConfig": "a/b--config.Config"}
    }
    hints = json.loads((there / "generation_config.json").read_text())
    assert hints["mask_token_id"] == again.mask_id and "base_model: authors/base" in (there / "README.md").read_text()


def test_weights_keep_their_precision(workdir, tmp_path):
    model = trained(workdir)
    load_backbone(model).model.to(torch.bfloat16).save_pretrained(model)
    assert {tensor.dtype for _, tensor in read_tensors(export(model))} == {torch.bfloat16}


def test_the_card_says_where_the_model_comes_from_and_what_it_scored(workdir):
    first = trained(workdir, name="first", data="text", data_path="data/text")
    write_record(first.parent, kind="run", name="first", config_digest="", inputs={})
    (workdir / "downloads/start/manifest.json").write_text(
        json.dumps({"hub": "authors/bert", "commit": "12345678" + "0" * 32, "licence": "apache-2.0"})
    )
    model = train(
        run_config("second", init="first", init_path="runs/first/model", steps=4, adapter=ADAPTER), workdir, quiet=True
    )
    model = model / "model"
    (workdir / "downloads/alpaca").mkdir()
    (workdir / "downloads/alpaca/manifest.json").write_text(json.dumps({"licence": "cc-by-nc-4.0"}))
    facts = {"run": "second", "benchmark": "sums", "metric": "acc", "shots": 2, "scorer": {"model_kind": "dllm"}}
    facts |= {"metrics": {"acc": {"value": 0.25, "low": 0.125, "high": 0.5, "n": 80}}}
    for name, digest in {"sums": directory_digest(model)["digest"], "stale": "0" * 64}.items():
        path = workdir / f"evals/second/{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts | {"benchmark": name, "inputs": {"checkpoint": digest}}))
    card = (export(model) / "README.md").read_text()
    top = yaml.safe_load(card.split("---\n")[1])
    assert top["license"] == "apache-2.0" and top["base_model"] == "authors/bert" and "diffusion" in top["tags"]
    assert top["pipeline_tag"] == "fill-mask" and top["library_name"] == "transformers"
    assert "| start | start | authors/bert@12345678 |" in card
    assert "| first | mdlm | text | corrected | 0.003 | 2 |" in card
    assert "| second | mdlm | alpaca | corrected, lora of rank 4, merged | 0.003 | 4 |" in card
    assert "| sums | acc | 2 | 25.0 [12.5, 50.0] % | 80 |" in card and "stale" not in card
    assert "| data | alpaca | synthetic (alpaca) | 72 | cc-by-nc-4.0 |" in card
    commit = json.loads((model.parent / "provenance.json").read_text())["commit"]
    assert f"seed 1, commit {commit}" in card


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        ("bd3lm", "**It attends block by block**: a token sees its own block of 4 tokens"),
        ("hybrid", "Its sampler is that of algorithm `hybrid`, which other tools do not have."),
        ("ar", "`generate` of transformers writes with it."),
    ],
)
def test_the_card_says_what_other_tools_have_to_know(workdir, algorithm, words):
    model = trained(workdir, "llama", algorithm=algorithm, prediction="next")
    there = export(model)
    card = (there / "README.md").read_text()
    assert words in card and "```python" not in card
    causal = algorithm == "ar"
    assert torch.equal(logits(load_backbone(there, causal=causal)), logits(load_backbone(model, causal=causal)))
    assert published_config(there).get("is_causal", True) is causal


def line_of(capsys, *words) -> str:
    capsys.readouterr()
    assert main([*map(str, words)]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


def test_what_cannot_be_exported_is_one_line(workdir, tmp_path, capsys):
    model = trained(workdir)
    assert "allowed: transformers, published; SGLang and vLLM read `published`" in line_of(
        capsys, "export", model, "--format", "sglang"
    )
    assert "comes from BertForMaskedLM, a class of transformers; take --format transformers" in line_of(
        capsys, "export", model, "--format", "published"
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("")
    assert "holds something that is not an export" in line_of(capsys, "export", model, "--output", tmp_path / "full")
    assert "not on this disk" in line_of(capsys, "export", "some/model")
    sidecar = json.loads((model / "dllm.json").read_text())
    (model / "dllm.json").write_text(json.dumps(sidecar | {"algorithm": "edit_flows"}))
    save_edit_heads(new_edit_heads(load_backbone(model.parent.parent.parent / "downloads/start").model), model)
    assert "further heads of a model trained with edit_flows" in line_of(capsys, "export", model)
    assert not (workdir / "exports").exists()


def test_an_export_takes_the_place_of_an_earlier_one(workdir, capsys):
    model = trained(workdir)
    there = export(model)
    (there / "README.md").write_text("mine")
    capsys.readouterr()
    assert main(["export", str(model)]) == 0 and capsys.readouterr().out == f"{there}\n"
    assert (there / "README.md").read_text() != "mine" and not list(there.parent.glob(".*"))
