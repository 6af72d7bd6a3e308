"""A toy checkpoint of Edit Flows that knows a few answers by heart, saved as training saves it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch

from dllm.config import EditSettings
from dllm.core.batch import Batch, row_noise
from dllm.models.edit_heads import HEADS_FILE
from dllm.models.load import SIDECAR, load_backbone
from dllm.objectives.edit_flows import EditFlows, save_heads, trained_module
from tests.toys import LEARNT, save_toy
from tests.training_loss import training_loss

STARTS = EditSettings(schedule="linear", starts=["empty", "noisy"], adapter_rank=8)


def save_edit_toy(directory: Path, *, steps: int = 0, seed: int = 0, **sidecar) -> Path:
    """Save a toy with edit heads, trained on `LEARNT` for some steps, and return its directory."""
    path = save_toy(directory, response_end="one", **sidecar)
    backbone = load_backbone(path)
    config = SimpleNamespace(edits=STARTS, seed=seed)
    objective = EditFlows(edits=STARTS, max_length=backbone.max_length)
    scores = trained_module(config, backbone).train()
    batch = learnt_batch(backbone)
    optimizer = torch.optim.AdamW(scores.parameters(), lr=5e-3)
    for step in range(steps):
        noise = row_noise(seed, step, batch.sample_ids, batch.tokens.shape[1])
        terms = training_loss(objective, scores, batch, noise, mask_id=backbone.mask_id, denominator=100.0)
        optimizer.zero_grad()
        terms.loss.backward()
        torch.nn.utils.clip_grad_norm_(scores.parameters(), 1.0)
        optimizer.step()
    backbone.model.save_pretrained(path)
    noted = (
        json.loads((path / SIDECAR).read_text())
        | {"algorithm": "edit_flows"}
        | save_heads(config, scores, scores.state_dict(), path)
    )
    (path / SIDECAR).write_text(json.dumps(noted))
    assert (path / HEADS_FILE).exists()
    return path


def learnt_batch(backbone, copies: int = 6) -> Batch:
    """The conversations of `LEARNT` with their answers as targets, several times over."""
    tokenizer = backbone.tokenizer
    prompts = [tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) for turns, _ in LEARNT]
    given = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
    answers = [tokenizer(f"{text}\n[/Answer]\n\n", add_special_tokens=False)["input_ids"] for _, text in LEARNT]
    rows = [p + a + [backbone.eos_id] for p, a in zip(given, answers, strict=True)] * copies
    starts = torch.tensor([len(p) for p in given] * copies)
    width = max(map(len, rows))
    tokens = torch.tensor([row + [backbone.pad_id] * (width - len(row)) for row in rows])
    attention = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    maskable = attention & (torch.arange(width) >= starts[:, None])
    return Batch(tokens, attention, maskable, torch.arange(len(rows)))
