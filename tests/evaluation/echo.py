"""A model whose scores are known: it knows the words of its prompt and no others."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from dllm.config import EvaluationConfig
from dllm.likelihood.racing import Verdict

NATS_PER_UNKNOWN_WORD = 2.0
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}" + (
    "{% if add_generation_prompt %}<answer>\n{% endif %}"
)


@dataclass(frozen=True)
class EchoScore:
    nats: float
    standard_error: float
    passes: int


@dataclass
class EchoModel:
    """`nelbo`: 2 nats per target token that the prompt lacks. `answers`: the prompt's last two words, then a stop.

    Counts its rows, and can be told to die after some of them.
    """

    tokenizer: object
    max_length: int = 64
    rows: int = 0
    die_after: int | None = None
    prompts: list = field(default_factory=list)

    @property
    def backbone(self):
        return SimpleNamespace(max_length=self.max_length, tokenizer=self.tokenizer)

    def _count(self, prompts):
        self.rows += len(prompts)
        self.prompts += prompts
        if self.die_after is not None and self.rows > self.die_after:
            raise KeyboardInterrupt

    def nelbo(self, prompts, targets, settings):
        self._count(prompts)
        return [
            EchoScore(NATS_PER_UNKNOWN_WORD * sum(t not in p for t in target), 0.5, len(target))
            for p, target in zip(prompts, targets, strict=True)
        ]

    def race(self, prompts, targets, questions, settings):
        """Questions whose choices are all as good as each other end undecided by `acc`."""
        scores = self.nelbo(prompts, targets, settings)
        values = [{scores[choice].nats for choice in question.requests} for question in questions]
        return scores, [Verdict(1, {}) if len(each) > 1 else Verdict(2, {"acc": 0.5}) for each in values]

    def greedy_match(self, prompts, targets, settings):
        return [all(t in p for t in target) for p, target in zip(prompts, targets, strict=True)]

    def answers(self, prompts, settings):
        self._count(prompts)
        return [
            SimpleNamespace(text=f"{self.tokenizer.decode(p[-2:])} STOP and more", passes=3, tokens=4) for p in prompts
        ]


def words_tokenizer():
    """One token per word; [CLS] before and [SEP] behind unless special tokens are left out; newlines are words."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = "[CLS] [SEP] [PAD] [UNK] [MASK] \n <user> <assistant> <answer> A B C D Question : Answer the a is in what"
    vocabulary = {}
    for word in [*words.split(" "), *(f"w{i}" for i in range(40)), *(str(i) for i in range(10))]:
        vocabulary.setdefault(word, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("\n"), "isolated"), pre_tokenizers.Split(Regex("[ ]+"), "removed")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
    )
    fast.chat_template = TEMPLATE
    return fast


# --------------------------------------------------------------------------------------------------------------------
# A work directory with a checkpoint and three small tasks

CHOICES = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{{DATA}}/{name}.jsonl", train: "{{DATA}}/{name}.jsonl"}}}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
GROUP = "group: both\ntask: [choices, few]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
LAST_WORD = """\
task: last
dataset_path: json
dataset_kwargs: {data_files: {test: "{DATA}/last.jsonl"}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{answer}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
WRITE = """\
task: write
dataset_path: json
dataset_kwargs: {data_files: {test: "{DATA}/write.jsonl"}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [" STOP"], max_gen_toks: 999}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
filter_list:
  - {name: strict, filter: [{function: regex, regex_pattern: "(w[0-9]+ w[0-9]+)"}, {function: take_first}]}
  - {name: flexible, filter: [{function: regex, regex_pattern: "(w[0-9]+)"}, {function: take_first}]}
"""
ROLLING = """\
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: "{DATA}/last.jsonl"}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""


def make_workdir(root: Path) -> Path:
    """A work directory with a checkpoint, tasks/ and data/.

    choices: 20 documents; the prompt holds the right choice in 15 of them (and none in the others).
    few: 10 documents, all right. last: 12, 8 right. write: 10, 6 right under `strict`, none under `flexible`.
    """
    checkpoint = root / "runs" / "echo" / "model"
    words_tokenizer().save_pretrained(checkpoint)
    (checkpoint / "config.json").write_text("{}")
    tasks, data = root / "tasks", root / "data"
    tasks.mkdir()
    data.mkdir()
    for name, text in {
        "choices": CHOICES.format(name="choices"),
        "few": CHOICES.format(name="few"),
        "both": GROUP,
        "last": LAST_WORD,
        "write": WRITE,
        "rolling": ROLLING,
    }.items():
        (tasks / f"{name}.yaml").write_text(text)
    # with none of the choices in the prompt the first one wins, which is not the answer
    write_rows(data / "choices.jsonl", [choice_row(i, known=i < 15) for i in range(20)])
    write_rows(data / "few.jsonl", [choice_row(i + 20, known=True) for i in range(10)])
    write_rows(
        data / "last.jsonl",
        [{"question": f"what is w{i} w{i + 1}", "answer": f"w{i}" if i < 8 else "w39"} for i in range(12)],
    )
    write_rows(
        data / "write.jsonl",
        [{"question": f"what is w{i} w{i + 1}", "answer": f"w{i} w{i + 1}" if i < 6 else "w39 w38"} for i in range(10)],
    )
    return root


def choice_row(i: int, *, known: bool) -> dict:
    right = f"w{i}"
    return {
        "question": f"what is {right if known else 'the'} in {i % 10}",
        "choices": ["w38", right, "w39"],
        "answer": 1,
    }


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluation(task: str, /, **settings) -> EvaluationConfig:
    """A config for one of the tasks above."""
    base = {
        "run": "echo",
        "checkpoint": "runs/echo/model",
        "benchmark": task,
        "task": task,
        "task_directory": "tasks",
        "data": "data",
        "shots": 0,
        "chat_template": False,
        "generation": {"max_new_tokens": 8},
    }
    if task == "write":
        base |= {"metric": "exact_match", "filter": "strict"}
    return EvaluationConfig.model_validate(base | settings)
