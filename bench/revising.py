"""Does revising pay? Right answers, the model's bound of its answers and repetitions against forward passes.

Each way to revise answers the same questions with several numbers of passes. The models are the laptop's largest chat
model and two toy systems; the workflow makes those that are not there. A real BERT takes part where
`results/chat-bert-tiny` holds one that `dllm tune` made, and `questions.jsonl` beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.measure import Result, say
from bench.options import Options
from bench.workloads import ROOT, laptop, system
from dllm.chat.speed import is_correct, read_questions
from dllm.config import GenerateSettings, LikelihoodSettings, overlaid
from dllm.language_model import Answer, DiffusionLM, Prompt, load

STEPS = (4, 8, 16, 32, 64)
NEW_TOKENS = 32
PLAIN = "nothing revised"
WAYS = {
    PLAIN: {},
    "remask: rescale, 0.3": {"remask": "rescale", "remask_share": 0.3},
    "remask: least, 0.3": {"remask": "least", "remask_share": 0.3},
    "remask: loop, 0.1": {"remask": "loop", "remask_share": 0.1},
    "edit above 0.9": {"edit_threshold": 0.9},
}
"""Ways of a masked model; a hybrid one is also sampled by its reverse process."""
REVERSE = "reverse process"
FEW = {name: WAYS[name] for name in (PLAIN, "remask: rescale, 0.3", "edit above 0.9")}


@dataclass(frozen=True)
class Asked:
    """One question, the answers that are right, and the pattern that finds an answer in a text."""

    prompt: Prompt
    sought: tuple[str, ...]
    pattern: str


Sets = dict[str, list[Asked]]


def revising(options: Options) -> Result:
    """One line for each model, set of questions, temperature, way and number of steps."""
    if options.quick:
        stand_in, asked = laptop(options), [Asked([7, 8, 9, 10], ("w1",), "(.*)")]
        few = measured("stand-in", {"": stand_in.model}, {"words": asked}, FEW, 0.0, steps=(2, 4), new_tokens=4)
        return Result(setup={"answers": list(few)})
    answers: list[dict] = []
    for name, models, sets, ways, steps in _cases(options):
        say(f"    {name}: {', '.join(f'{len(asked)} {label}' for label, asked in sets.items())}")
        answers += measured(name, models, sets, ways, 0.0, steps=steps)
        if name == "encoder-mdlm":
            answers += measured(name, models, sets, FEW, 1.0, steps=STEPS[1:])
    return Result(setup={"answers": answers, "new tokens": NEW_TOKENS})


def _cases(options: Options) -> Iterator[tuple[str, dict[str, DiffusionLM], Sets, dict[str, dict], tuple[int, ...]]]:
    """Name, models by how they are sampled, questions, ways and numbers of steps of each model."""
    for name in ("encoder-mdlm", "encoder-hybrid"):
        path, world = system(name)
        sets = {"facts": questions(world / "mmlu/*/dev.jsonl", r"(\w+)\.?$", 35)}  # sums are beyond these two
        models = {"": load(path, device="cpu", algorithm="mdlm")}
        if name == "encoder-hybrid":
            models[REVERSE] = load(path, device="cpu")
        yield name, models, sets, WAYS, STEPS
    trained = laptop(options)
    assert trained.benchmarks is not None, "only the stand-in has none"
    sums = questions(trained.benchmarks / "gsm8k/test.jsonl", "#### (.*)", 40)
    yield "chat-large", {"": trained.model}, {"sums": sums}, FEW, STEPS
    tuned = ROOT / "results/chat-bert-tiny"
    if (tuned / "questions.jsonl").is_file():
        path = tuned / "runs/chat-bert-tiny/model"
        chat = questions(tuned / "questions.jsonl", "(.*)", 24)
        yield "chat-bert-tiny", {"": load(path, device="cpu")}, {"chat": chat}, FEW, STEPS[:-1]
    else:
        say(f"    no {tuned.name}/questions.jsonl: the real BERT is left out")


def questions(path: Path, pattern: str, count: int) -> list[Asked]:
    """The first different questions of a file; one that is asked again has several right answers."""
    sought: dict[str, list[str]] = {}
    for question in read_questions(path, pattern, 100_000):
        sought.setdefault(question.text, []).append(question.answer)
    some = list(sought.items())[:count]
    return [Asked([{"role": "user", "content": text}], tuple(right), pattern) for text, right in some]


def measured(
    name: str,
    models: dict[str, DiffusionLM],
    sets: Sets,
    ways: dict[str, dict],
    temperature: float,
    *,
    steps: Sequence[int] = STEPS,
    new_tokens: int = NEW_TOKENS,
) -> Iterator[dict]:
    """The lines of one model, in the blocks that it was trained with.

    models: by the way that it is sampled; that of "" has all other ways. Its own algorithm scores the answers of all.
    """
    masked = models[""]
    scorer = models.get(REVERSE, masked)
    size = min(new_tokens, (masked.backbone.sidecar or {}).get("block_size", new_tokens))
    settings = GenerateSettings(max_new_tokens=new_tokens, block_size=size, batch_size=128, temperature=temperature)
    every = {way: (masked, changes) for way, changes in ways.items()}
    every |= {way: (model, {}) for way, model in models.items() if way}
    for way, (model, changes) in every.items():
        for count in steps:
            if count > new_tokens and not ("remask" in changes or way == REVERSE):
                continue  # more passes than tokens are for those that take tokens back
            answers = model.answers(
                [one.prompt for asked in sets.values() for one in asked],
                overlaid(settings, {**changes, "steps": count}),
            )
            for label, asked in sets.items():
                own, answers = answers[: len(asked)], answers[len(asked) :]
                facts = {"model": name, "questions": label, "temperature": temperature, "way": way, "steps": count}
                yield facts | figures(scorer, asked, own)


def figures(scorer: DiffusionLM, asked: list[Asked], answers: list[Answer]) -> dict:
    """What the answers to one set of questions are worth, and what they took."""
    pairs = list(zip(asked, answers, strict=True))
    return {
        "passes": sum(answer.passes for answer in answers) / len(answers),
        "right": sum(any(is_correct(one.text, right, it.pattern) for right in it.sought) for it, one in pairs),
        "of": len(answers),
        "empty": sum(not answer.tokens for answer in answers),
        "bound": bound(scorer, [(it.prompt, one.ids) for it, one in pairs if one.tokens]),
        "repeated": repeated(answers),
    }


def bound(model: DiffusionLM, pairs: Sequence[tuple[Prompt, Sequence[int]]]) -> float | None:
    """Nats per token by which the model bounds -log p of these answers to their prompts; None for no answers."""
    if not pairs:
        return None
    prompts, ids = zip(*pairs, strict=True)
    scores = model.nelbo(prompts, ids, LikelihoodSettings())
    return sum(score.nats for score in scores) / sum(map(len, ids))


def repeated(answers: Sequence[Answer]) -> float:
    """Share of the answers' tokens that are the same as the one before."""
    pairs = [pair for answer in answers for pair in zip(answer.ids, answer.ids[1:], strict=False)]
    return sum(one == other for one, other in pairs) / max(1, len(pairs))
