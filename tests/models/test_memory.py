"""What loading costs, measured in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dllm.config import ModelEntry
from dllm.models.load import save_stand_in
from tests.toys import word_tokenizer

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory map of Linux")

SIZES = {
    "LLaDA": {"d_model": 512, "mlp_hidden_size": 4096, "n_layers": 10, "n_heads": 8, "n_kv_heads": 8,
              "max_sequence_length": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "weight_tying": False},
    "RND1": {"hidden_size": 512, "intermediate_size": 512, "moe_intermediate_size": 512, "num_hidden_layers": 5,
             "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "num_experts": 16,
             "num_experts_per_tok": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
             "tie_word_embeddings": False},
}  # fmt: skip

MEASURE = """
import sys, threading, time
import torch, dllm, transformers
from transformers import AutoModelForCausalLM
from dllm.models.load import load_backbone

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

load_backbone(sys.argv[2])  # what a first load imports is not what a model takes
before = most = anonymous()
done = False

def watch():
    global most
    while not done:
        most = max(most, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
backbone = load_backbone(sys.argv[1], dtype="auto")
done = True
thread.join()
weights = sum(p.nbytes for p in backbone.model.parameters())
print(next(backbone.model.parameters()).dtype, weights, most - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("family", "at_most"), [("LLaDA", 0.35), ("RND1", 1.5)])
def test_bf16_weights_are_mapped_from_disk_and_experts_are_stacked_once(family, at_most, tmp_path):
    """The published layout has one tensor for each expert, the stock class one for all of a layer."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        for name, layers in (("model", None), ("small", 1)):
            new = SIZES[family] if layers is None else SIZES[family] | {"n_layers": 1, "num_hidden_layers": 1}
            new = {key: value for key, value in new.items() if key in SIZES[family]}
            entry = ModelEntry(new=new, published=family, tokenizer="words", family="decoder")
            save_stand_in(entry, word_tokenizer(), tmp_path / name)
    finally:
        torch.set_default_dtype(before)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "model"), str(tmp_path / "small")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kind, weights, most = done.stdout.split()[-3:]
    assert kind == "torch.bfloat16" and int(weights) > 1e8
    # of what is stacked there is one copy, and how much is on its way at a time is a matter of threads
    assert int(most) < at_most * int(weights)
