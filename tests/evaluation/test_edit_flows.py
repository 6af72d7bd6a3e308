"""A checkpoint of Edit Flows on benchmarks: those that generate work, a likelihood is one clear line."""

import json

from dllm.cli.main import main
from dllm.config import write_when_changed
from tests.edit_checkpoint import save_edit_toy

from .echo import evaluation, words_tokenizer


def test_it_answers_freely_and_says_that_it_has_no_likelihood(workdir, capsys):
    checkpoint = workdir / "runs/edits/model"
    save_edit_toy(checkpoint, words=sorted(words_tokenizer().get_vocab()))
    sampler = {"max_new_tokens": 8, "steps": 4, "temperature": 1.0}
    for task in ("write", "both", "last"):
        config = evaluation(task, run="edits", checkpoint="runs/edits/model", generation=sampler)
        path = write_when_changed(workdir / f"configs/evals/edits/{task}.yaml", config)
        status = main(["evaluate", str(path), "--device", "cpu"])
        found = capsys.readouterr()
        if task == "write":
            assert status == 0, found.err
            result = json.loads((workdir / "evals/edits/write.json").read_text())
            assert result["passes"] > 0
            continue
        assert status == 2 and not (workdir / f"evals/edits/{task}.json").exists()
        (line,) = [line for line in found.err.splitlines() if "error" in line]
        assert "algorithm = 'edit_flows' has no estimator of the likelihood; evaluate it on benchmarks that" in line
