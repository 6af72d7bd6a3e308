"""Does revising pay? Right answers against forward passes, for each way to revise, on questions with known answers.

    python -m bench.revising --out FILE --questions NAME=FILE:PATTERN ... CHECKPOINT...

It needs trained checkpoints, so that it is no case of `python -m bench`. Rows of one result: model, way, set of
questions, passes per answer, right answers, answers, and the share of their tokens that repeat the one before.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import dllm
from dllm.chat.speed import Question, is_correct, read_questions
from dllm.config import GenerateSettings, overlaid
from dllm.language_model import Answer, DiffusionLM
from dllm.provenance import hardware, write_atomically

STEPS = (4, 8, 16, 32, 64)

WAYS = {
    "nothing revised": {},
    "remask: rescale, 0.3": {"remask": "rescale", "remask_share": 0.3},
    "remask: least, 0.3": {"remask": "least", "remask_share": 0.3},
    "remask: loop, 0.1": {"remask": "loop", "remask_share": 0.1},
    "edit above 0.9": {"edit_threshold": 0.9},
}
"""Ways of a masked model; a hybrid one is also sampled by its reverse process."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--questions", nargs="+", required=True, metavar="NAME=FILE:PATTERN")
    parser.add_argument("--limit", type=int, default=40, help="questions of each set")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, metavar="WAY")
    args = parser.parse_args()
    sets = {}
    for text in args.questions:
        name, rest = text.split("=", 1)
        path, pattern = rest.split(":", 1)
        sets[name] = (read_questions(path, pattern, args.limit), pattern)
    rows: list[dict] = []
    for checkpoint in args.checkpoints:
        for row in measured(checkpoint, sets, args.new_tokens, args.steps, args.ways):
            print(json.dumps(row), flush=True)
            rows.append(row)
            write_atomically(args.out, json.dumps({"hardware": hardware(), "rows": rows}, indent=1) + "\n")


def measured(
    checkpoint: Path, sets: dict[str, tuple[list[Question], str]], new_tokens: int, steps: list[int], ways: list[str]
) -> Iterator[dict]:
    """One row per way, number of steps and set of questions, in the blocks that the model was trained with."""
    model = dllm.load(checkpoint, device="cpu")
    plain = GenerateSettings(max_new_tokens=new_tokens, block_size=model.backbone.sidecar["block_size"], batch_size=128)
    hybrid = model.algorithm.name == "hybrid"
    models = {"": dllm.load(checkpoint, device="cpu", algorithm="mdlm") if hybrid else model}
    if hybrid:
        models["reverse process"] = model
    for kind, sampled in models.items():
        for way, changes in {kind: {}}.items() if kind else ((way, WAYS[way]) for way in ways):
            for count in steps:
                if count > new_tokens and way in ("nothing revised", "edit above 0.9"):
                    continue
                settings = overlaid(plain, {**changes, "steps": count})
                yield from answered(checkpoint.parent.name, way, count, sampled, sets, settings)


def answered(
    name: str,
    way: str,
    steps: int,
    model: DiffusionLM,
    sets: dict[str, tuple[list[Question], str]],
    settings: GenerateSettings,
) -> Iterator[dict]:
    """The rows of one way and number of steps; all sets are answered together."""
    asked = [question for questions, _ in sets.values() for question in questions]
    answers = model.answers([[{"role": "user", "content": question.text}] for question in asked], settings)
    at = 0
    for label, (questions, pattern) in sets.items():
        own = answers[at : at + len(questions)]
        at += len(questions)
        right = [is_correct(a.text, q.answer, pattern) for a, q in zip(own, questions, strict=True)]
        yield {
            "model": name,
            "way": way,
            "steps": steps,
            "questions": label,
            "passes": sum(answer.passes for answer in own) / len(own),
            "right": sum(right),
            "of": len(own),
            "repeated": repeated(own),
        }


def repeated(answers: list[Answer]) -> float:
    """Share of the answers' tokens that are the same as the one before."""
    ids = [answer.ids[: answer.tokens] for answer in answers]
    pairs = [pair for own in ids for pair in zip(own, own[1:], strict=False)]
    return sum(one == other for one, other in pairs) / max(1, len(pairs))


if __name__ == "__main__":
    main()
