"""Exports in a process that has transformers and no dllm: `python stock_logits.py JOBS OUT`.

JOBS: a JSON list of {"directory", "auto" (a class of transformers), "tokens" (rows), "question" (None: do not sample)}.
OUT: where a list of (logits, what the card's program prints) is saved. It must not import the tests.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

import torch
import transformers

jobs, out = sys.argv[1:]
torch.set_num_threads(1)
found = []
for job in json.loads(jobs):
    model, report = getattr(transformers, job["auto"]).from_pretrained(job["directory"], output_loading_info=True)
    assert not any(report.values()), report
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["directory"])
    turns = [{"role": "user", "content": "who ?"}]
    assert "who ?" in tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor(job["tokens"])).logits
    printed = io.StringIO()
    if job["question"]:
        program = (Path(job["directory"]) / "README.md").read_text().split("```python\n")[1].split("```")[0]
        sys.argv = ["sample.py", job["directory"], job["question"]]
        with contextlib.redirect_stdout(printed):
            exec(compile(program, "card", "exec"), {})
    found.append((logits, printed.getvalue().strip()))
assert "dllm" not in sys.modules
torch.save(found, out)
