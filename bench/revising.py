"""Does revising pay? Right answers against forward passes, for each way to revise, on questions with known answers.

    python -m bench.revising --out FILE --questions NAME=FILE:PATTERN ... -- CHECKPOINT...
    python -m bench.revising --draw FILE.svg RESULT...

It needs trained checkpoints, so that it is no case of `python -m bench`. Rows of one result: model, way, set of
questions, passes per answer, right answers, answers, and the share of their tokens that repeat the one before.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import dllm
from dllm.chat.speed import is_correct, read_questions
from dllm.config import GenerateSettings, overlaid
from dllm.language_model import Answer, DiffusionLM
from dllm.provenance import hardware, write_atomically

Questions = tuple[dict[str, list[str]], str]
"""Questions with the answers sought, and the pattern that finds an answer in a text."""

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
    parser.add_argument("inputs", nargs="+", type=Path, help="checkpoints, or with --draw results")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--draw", type=Path)
    parser.add_argument("--questions", nargs="+", default=[], metavar="NAME=FILE:PATTERN")
    parser.add_argument("--limit", type=int, default=40, help="questions of each set")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, metavar="WAY")
    args = parser.parse_args()
    if args.draw:
        return draw([row for path in args.inputs for row in json.loads(path.read_text())["rows"]], args.draw)
    sets = {}
    for text in args.questions:
        name, rest = text.split("=", 1)
        path, pattern = rest.split(":", 1)
        answers: dict[str, list[str]] = {}  # a question that is asked again has several right answers
        for question in read_questions(path, pattern, 100_000):
            answers.setdefault(question.text, []).append(question.answer)
        sets[name] = (dict(list(answers.items())[: args.limit]), pattern)
    rows: list[dict] = []
    for checkpoint in args.inputs:
        for row in measured(checkpoint, sets, args.new_tokens, args.steps, args.ways, args.temperature):
            print(json.dumps(row), flush=True)
            rows.append(row)
            write_atomically(args.out, json.dumps({"hardware": hardware(), "rows": rows}, indent=1) + "\n")


def measured(
    checkpoint: Path, sets: dict[str, Questions], new_tokens: int, steps: list[int], ways: list[str], heat: float
) -> Iterator[dict]:
    """One row per way, number of steps and set of questions, in the blocks that the model was trained with."""
    model = dllm.load(checkpoint, device="cpu")
    size = model.backbone.sidecar["block_size"]
    plain = GenerateSettings(max_new_tokens=new_tokens, block_size=size, batch_size=128, temperature=heat)
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
    sets: dict[str, Questions],
    settings: GenerateSettings,
) -> Iterator[dict]:
    """The rows of one way and number of steps; all sets are answered together."""
    asked = [text for questions, _ in sets.values() for text in questions]
    answers = model.answers([[{"role": "user", "content": text}] for text in asked], settings)
    at = 0
    for label, (questions, pattern) in sets.items():
        own = answers[at : at + len(questions)]
        at += len(questions)
        right = [
            any(is_correct(answer.text, one, pattern) for one in sought)
            for answer, sought in zip(own, questions.values(), strict=True)
        ]
        yield {
            "model": name,
            "way": way,
            "steps": steps,
            "temperature": settings.temperature,
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


def panel(row: dict) -> tuple[str, str, float]:
    """Which panel a row belongs to."""
    return row["model"], row["questions"], row["temperature"]


def draw(rows: list[dict], path: Path) -> None:
    """One panel for each model, set of questions and temperature: right answers and intervals against passes."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    from dllm.numbers import wilson_interval
    from dllm.report.style import RC, WIDTH, head, looks

    # where nobody is right once in ten times, a panel shows nothing
    panels = list(dict.fromkeys(panel(row) for row in rows if row["right"] > 0.1 * row["of"]))
    ways = list(dict.fromkeys(row["way"] for row in rows))
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(WIDTH, 1.1 + 2.5 * -(-len(panels) // 2)))
        axes = figure.subplots(-(-len(panels) // 2), 2, squeeze=False).flatten()
        for ax, which in zip(axes, panels, strict=False):
            for shift, (way, look) in enumerate(looks(ways).items()):
                own = [row for row in rows if panel(row) == which and row["way"] == way]
                own.sort(key=lambda row: row["passes"])
                x = [row["passes"] * 1.02 ** (shift - len(ways) / 2) for row in own]  # intervals side by side
                for at, row in zip(x, own, strict=True):
                    low, high = wilson_interval(row["right"], row["of"])
                    ax.plot([at, at], [100 * low, 100 * high], color=look.color, linewidth=0.7, alpha=0.5)
                shares = [100 * row["right"] / row["of"] for row in own]
                ax.plot(x, shares, color=look.color, marker=look.marker, label=way)
            ax.set(
                xscale="log",
                ylim=(0, 100),
                title=f"{which[0]}: {which[1]}, temperature {which[2]:g}",
                xlabel="passes per answer",
            )
            ax.set_xticks([2, 4, 8, 16, 32], ["2", "4", "8", "16", "32"])
            ax.xaxis.set_minor_locator(NullLocator())
            ax.set_ylabel("right, per cent")
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        head(figure, "Right answers by forward passes, for each way to revise", below=0.6)
        handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        top = 1 - 0.4 / figure.get_figheight()
        figure.legend(handles.values(), handles, loc="upper left", ncols=3, bbox_to_anchor=(0.0, top))
        figure.subplots_adjust(left=0.07, right=0.985, bottom=0.5 / figure.get_figheight(), wspace=0.2, hspace=0.55)
        figure.savefig(path)


if __name__ == "__main__":
    main()
