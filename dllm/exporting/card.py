"""The card of an export: README.md as the hub reads it, generated from what is known of the checkpoint's origin."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dllm.algorithms import ALGORITHMS, trained_blocks, trained_causally
from dllm.chat.settings import chat_context, chat_generation
from dllm.exporting.lineage import Lineage
from dllm.models.hidden import COUNTS_FROM_PADDING
from dllm.numbers import ABSENT
from dllm.report.format import fixed, interval, quantity
from dllm.sampling.sampler import MaskedSampler

if TYPE_CHECKING:
    from dllm.families import Family
    from dllm.models.backbone import Backbone

SAMPLER = """\
import sys

import torch
from transformers import {auto}, AutoTokenizer

PLACE = sys.argv[1]  # this directory, or its name on the hub
QUESTION = sys.argv[2]
NEW_TOKENS, BLOCK = {new_tokens}, {block}

tokenizer = AutoTokenizer.from_pretrained(PLACE)
model = {auto}.from_pretrained(PLACE).eval()
{prompt}
start = len(row)
row = torch.tensor([row + [tokenizer.mask_token_id] * NEW_TOKENS])
for begin in range(start, row.shape[1], BLOCK):
    end = min(begin + BLOCK, row.shape[1])
    for _ in range(begin, end):  # each pass reveals the token that the model is most sure of
        seen = row[:, :{seen}]
        with torch.no_grad():
            logits = model(input_ids=seen{positions}).logits[0].float(){shift}
        logits[:, tokenizer.mask_token_id] = -torch.inf
        sure, token = logits[begin:end].softmax(-1).max(-1)
        sure[row[0, begin:end] != tokenizer.mask_token_id] = -1
        place = int(sure.argmax())
        row[0, begin + place] = token[place]
answer = row[0, start:].tolist()
for stop in {stops}:
    answer = answer[: answer.index(stop)] if stop in answer else answer
print(tokenizer.decode(answer, skip_special_tokens=True).split({end_of_turn!r})[0].strip())
"""
CHAT = """\
messages = [{"role": "user", "content": QUESTION}]
text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
row = tokenizer(text, add_special_tokens=False)["input_ids"]"""
TEXT = 'row = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]'


def card(backbone: Backbone, lineage: Lineage, family: Family | None) -> str:
    """README.md of an export; family: whose published layout it has (None: a stock class)."""
    parts = [
        f"# {lineage.name}",
        _what(backbone, family),
        "## How it was made",
        _runs(lineage),
        "## Data and licences",
        _sources(lineage),
        "## Scores",
        _scores(lineage),
        "## How to sample",
        _sampling(backbone, lineage, family),
    ]
    return f"---\n{_metadata(backbone, lineage)}\n---\n\n" + "\n\n".join(parts) + "\n"


def _causal(backbone: Backbone) -> bool:
    return trained_causally(backbone.sidecar.get("algorithm"))


def _in_blocks(backbone: Backbone) -> bool:
    return trained_blocks(backbone.sidecar.get("algorithm")) == "trained"


def _metadata(backbone: Backbone, lineage: Lineage) -> str:
    """What the hub reads at the top of a card."""
    from huggingface_hub import ModelCardData

    licence = lineage.base.get("licence")
    task = "fill-mask" if backbone.family == "encoder" else "text-generation"
    data = ModelCardData(
        license=licence if licence and licence == licence.lower() and " " not in licence else None,
        license_name=licence if licence and (licence != licence.lower() or " " in licence) else None,
        base_model=lineage.base.get("hub"),
        datasets=sorted({source["hub"] for source in lineage.data if source.get("hub")}) or None,
        library_name="transformers",
        pipeline_tag=task,
        tags=["dllm"] if _causal(backbone) else ["diffusion", "text-diffusion", "dllm"],
    )
    return data.to_yaml()


def _what(backbone: Backbone, family: Family | None) -> str:
    count = quantity(sum(parameter.numel() for parameter in backbone.model.parameters()))
    stock = type(backbone.model).__name__
    if _causal(backbone):
        return (
            f"An autoregressive language model: `{stock}`, {count} parameters, rows up to {_length(backbone)} tokens."
        )
    says = [
        f"A diffusion language model: it writes by filling in masks (`{backbone.tokenizer.mask_token}`). "
        + (f"`{stock}` of transformers" if family is None else f"`{family.architectures[0]}`, in the published layout")
        + f", {count} parameters, rows up to {_length(backbone)} tokens."
    ]
    if backbone.prediction == "next":
        says.append("- **Position i scores token i + 1**; the first position scores the first token, too.")
    else:
        says.append("- Position i scores token i.")
    if _in_blocks(backbone):
        says.append(
            f"- **It attends block by block**: a token sees its own block of {backbone.sidecar['block_size']} tokens "
            "and all before it. A forward pass without a mask of that kind sees later blocks too, and gives other "
            "logits: pass `attention_mask` [1, 1, L, L], true where the block of the key is not later than that of "
            "the query."
        )
    else:
        says.append("- Every token sees every other.")
    if backbone.family == "decoder" and family is None:
        says.append(
            "- `is_causal: false` in config.json is what makes transformers (5.2 and later) attend in both directions. "
            "A tool that ignores it attends to the left only, and then the model is of no use."
        )
    return "\n".join([says[0], "", *says[1:]])


def _length(backbone: Backbone) -> int:
    return chat_context(backbone.sidecar, backbone.max_length)


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _runs(lineage: Lineage) -> str:
    if not lineage.runs:
        return "Nothing is recorded about its training."
    rows = [(lineage.base["name"], "start", _place(lineage.base), ABSENT, ABSENT, ABSENT, ABSENT)]
    for config, facts in lineage.runs:
        adapter = config.get("adapter")
        recipe = config["recipe_name"] + (f", {adapter['kind']} of rank {adapter['rank']}, merged" if adapter else "")
        rate = config["optimizer"]["learning_rate"]
        steps = ABSENT if facts["steps"] is None else f"{facts['steps']:,}"
        tokens = quantity(facts.get("tokens"))
        rows.append((config["name"], config["algorithm"], config["data"], recipe, f"{rate:g}", steps, tokens))
    head = ("run", "algorithm", "data", "recipe", "learning rate", "steps", "tokens")
    last = lineage.runs[-1][1]
    said = [f"{key} {value}" for key in ("seed", "commit", "hardware") if (value := last.get(key)) not in (None, "")]
    return _table(head, rows) + f"\n\nThe last run: {', '.join(said)}." * bool(said)


def _place(source: dict[str, Any]) -> str:
    """A hub id at its commit, or what else a source is."""
    if source.get("hub"):
        return f"{source['hub']}@{str(source.get('commit') or source.get('revision'))[:8]}"
    return f"synthetic ({source['world']})" if source.get("world") else "local"


def _sources(lineage: Lineage) -> str:
    rows = [("base model", lineage.base["name"], _place(lineage.base), ABSENT, _licence(lineage.base))]
    for source in lineage.data:
        count = source.get("train_rows")
        found = (source["name"], _place(source), ABSENT if count is None else f"{count:,}", _licence(source))
        rows.append(("data", *found))
    table = _table(("what", "name", "from", "rows", "licence"), rows)
    return f"{table}\n\nLicences are as the cards of these sources state them; this model's is for its owner to say."


def _licence(source: dict[str, Any]) -> str:
    return source.get("licence") or "not stated"


def _scores(lineage: Lineage) -> str:
    if not lineage.scores:
        return "This checkpoint was not evaluated."
    rows = []
    for record in lineage.scores:
        found = record["metrics"][record["metric"]]
        numbers = [found[key] for key in ("value", "low", "high")]
        known = [number for number in numbers if number is not None]
        scale, unit = (100, " %") if all(0 <= number <= 1 for number in known) else (1, "")
        known = [scale * number for number in known]
        shown = interval(*known) if len(known) == 3 else fixed(known[0])
        shots = ABSENT if record.get("shots") is None else record["shots"]
        rows.append((record["benchmark"], record["metric"], shots, shown + unit, found["n"]))
    return _table(("benchmark", "metric", "shots", "score with 95 % interval", "documents"), rows)


def _sampling(backbone: Backbone, lineage: Lineage, family: Family | None) -> str:
    chat = "The tokenizer has the chat template. " if backbone.tokenizer.chat_template else ""
    if _causal(backbone):
        return f"{chat}`generate` of transformers writes with it."
    here = f'{chat}With dllm: `dllm chat DIRECTORY`, or `dllm sample DIRECTORY "Hello!"`.'
    if _in_blocks(backbone):
        return f"{here} Other tools need attention in blocks, as said above."
    trained = backbone.sidecar.get("algorithm")
    if trained in ALGORITHMS and ALGORITHMS[trained].part("sampler")() != MaskedSampler():
        return f"{here} Its sampler is that of algorithm `{trained}`, which other tools do not have."
    if family is not None:
        return (
            f"{here} SGLang, vLLM and the code of {family.name}'s authors read this layout; what they need of it is in "
            "config.json and generation_config.json."
        )
    script = _script(backbone)
    return f"{here}\n\nWith transformers alone, the surest token first, block by block:\n\n```python\n{script}```"


def _script(backbone: Backbone) -> str:
    """A program that samples with transformers alone, as `dllm sample` does at temperature 0."""
    sidecar, tokenizer = backbone.sidecar, backbone.tokenizer
    settings = chat_generation(sidecar, chat_context(sidecar, backbone.max_length))
    end = sidecar.get("special_tokens", {}).get("end_of_turn") or tokenizer.eos_token
    special = [end] if end in tokenizer.all_special_tokens else []
    first = backbone.pad_id + 1
    counts = backbone.model.config.model_type in COUNTS_FROM_PADDING
    return SAMPLER.format(
        auto="AutoModelForMaskedLM" if backbone.family == "encoder" else "AutoModelForCausalLM",
        new_tokens=settings.max_new_tokens,
        block=settings.block_size,
        prompt=CHAT if tokenizer.chat_template else TEXT,
        seen="end" if sidecar.get("response_end") == "block" else "row.shape[1]",
        positions=f", position_ids={first} + torch.arange(seen.shape[1])[None]" if counts else "",
        shift="[[0, *range(seen.shape[1] - 1)]]  # one ahead" if backbone.prediction == "next" else "",
        stops=sorted({backbone.eos_id, backbone.pad_id, *tokenizer.convert_tokens_to_ids(special)}),
        end_of_turn=end,
    )
