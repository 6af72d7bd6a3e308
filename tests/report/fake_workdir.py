"""Writes a small work directory with invented numbers, so that the report can be built without training.

python tests/report/fake_workdir.py /tmp/fake
"""

import hashlib
import json
import sys
from math import exp, sqrt
from pathlib import Path

import numpy as np

from dllm.numbers import wilson_interval
from dllm.report.claims import build_claims
from dllm.report.figures import build_figures
from dllm.report.page import build_page
from dllm.report.plan import ReportPlan
from dllm.report.tables import build_tables

ENCODERS = ("ModernBERT-base", "ModernBERT-large", "BERT-base", "BERT-large", "RoBERTa-base", "RoBERTa-large")
FINAL = (2.62, 2.31, 3.05, 2.84, 2.96, 2.71)
STARTS = ("untuned", "after Wikitext", "after OpenWebText")
RECIPES = ("published", "corrected")
BENCHMARKS = {
    "lambada": ("LAMBADA", None, 5153),
    "gsm8k": ("GSM8K", None, 1319),
    "ceval": ("CEVAL", 0.25, 1346),
    "bbh": ("BBH", 0.0, 6511),
    "minerva_math": ("MATH", 0.0, 5000),
    "mmlu": ("MMLU", 0.25, 14042),
    "winogrande": ("Winogrande", 0.5, 1267),
    "hellaswag": ("HellaSwag", 0.25, 10042),
    "cmmlu": ("CMMLU", 0.25, 11582),
}
SCORES = {
    "chat-base": (48.1, 4.2, 24.1, 19.2, 2.7, 26.6, 50.2, 39.6, 25.4),
    "chat-large": (47.0, 14.9, 25.9, 24.4, 3.5, 32.4, 52.7, 44.1, 26.7),
    "chat-large-published": (46.5, 10.1, 24.9, 23.9, 3.4, 30.2, 50.4, 43.0, 26.1),
    "qwen-ar": (47.9, 20.6, 48.8, 18.9, 3.0, 38.7, 54.6, 47.5, 45.9),
    "chat-large-monte-carlo": (None, None, None, None, None, 32.1, 52.4, 43.9, None),
    "untuned": (0.4, 0.0, 24.8, 1.1, 0.1, 25.1, 49.3, 26.4, 24.9),
}
REPORTED = {
    "ModernBERT-base-chat-v0": ((49.3, 5.9, 25.0, 17.9, 3.1, 26.1, 49.7, 41.0, 24.3), "report"),
    "ModernBERT-large-chat-v0": ((46.3, 17.1, 24.6, 25.1, 3.8, 33.5, 53.1, 45.0, 27.5), "report"),
    "ModernBERT-large-chat-v0.1": ((46.3, 9.3, 26.5, 25.6, 3.6, 29.6, 49.0, 40.9, 26.5), "README Feb 2026"),
    "Qwen1.5-0.5B": ((48.6, 22.0, 50.5, 18.3, 3.1, 39.2, 55.0, 48.2, 46.6), "vendor / README"),
    "gpt2-medium": ((55.5, 2.1, 24.6, 17.8, 1.4, 22.9, 53.1, 39.4, 0.3), "paper / README"),
}
NASTY = "x < 3 && y > \"2\" | `a|b` ```\n<script>alert('no')</script> ```` $5_000 {ok} \\ end"


def plan_dict(toy: bool = False) -> dict:
    """The plan of a report that shows everything in the fake work directory."""
    return {
        "title": "BERTs that chat with diffusion: a reproduction",
        "toy": toy,
        "pretraining": [{"run": f"wikitext-{name.lower()}", "label": name} for name in ENCODERS],
        "openwebtext": [{"run": "openwebtext-large", "label": "ModernBERT-large"}],
        "ablation": [
            {"label": start, "run": f"alpaca-{index}-{recipe}", "recipe": recipe}
            for recipe in RECIPES
            for index, start in enumerate(STARTS)
        ],
        "chat": [
            {"run": "chat-base", "label": "ModernBERT-base-chat"},
            {"run": "chat-large", "label": "ModernBERT-large-chat"},
        ],
        "results": [
            {"run": "chat-base", "label": "ModernBERT-base-chat", "published_as": "ModernBERT-base-chat-v0"},
            {
                "run": "chat-large",
                "label": "ModernBERT-large-chat",
                "published_as": "ModernBERT-large-chat-v0",
                "close_to": "Qwen1.5-0.5B",
            },
            {
                "run": "chat-large-published",
                "label": "ModernBERT-large-chat",
                "recipe": "published",
                "published_as": "ModernBERT-large-chat-v0.1",
            },
            {"run": "qwen-ar", "label": "Qwen1.5-0.5B", "kind": "ar", "published_as": "Qwen1.5-0.5B"},
            {
                "run": "chat-large-monte-carlo",
                "label": "ModernBERT-large-chat, Monte Carlo",
                "kind": "again",
                "benchmarks": ["mmlu", "winogrande", "hellaswag"],
            },
            {"run": "untuned", "label": "ModernBERT-large, untuned", "kind": "control"},
        ],
        "benchmarks": [{"name": name, "label": label, "chance": c} for name, (label, c, _) in BENCHMARKS.items()],
        "reported": [
            {"label": label, "source": source, "scores": dict(zip(BENCHMARKS, values, strict=True))}
            for label, (values, source) in REPORTED.items()
        ],
        "samples": "chat-large",
        "speed": "chat-large",
        "estimators": ["chat-large", "chat-large-monte-carlo"],
    }


def brief_dict(toy: bool = False) -> dict:
    """The same plan without encoders, OpenWebText and ablation: half the tables and figures, a third of the time."""
    return plan_dict(toy) | {"pretraining": [], "openwebtext": [], "ablation": []}


def write_workdir(folder: Path, *, seed: int = 0) -> Path:
    """Writes the work directory below `folder`; the same seed writes the same bytes. Returns `folder`."""
    noise = np.random.default_rng(seed)
    for name, final in zip(ENCODERS, FINAL, strict=True):
        write_run(folder, f"wikitext-{name.lower()}", noise, first=6.5, final=final)
    write_run(folder, "openwebtext-large", noise, first=2.36, final=2.30, steps=18000, every=60, wall=216_000)
    for recipe, finals in (("published", (1.72, 1.71, 1.715)), ("corrected", (1.53, 1.515, 1.50))):
        for index, final in enumerate(finals):
            write_run(folder, f"alpaca-{index}-{recipe}", noise, first=3.1, final=final, steps=1900, every=10)
    write_run(folder, "chat-base", noise, first=3.0, final=1.61, steps=9000, every=45, wall=14_600)
    write_run(folder, "chat-large", noise, first=2.7, final=1.38, steps=9000, every=45, wall=25_320)
    for run, values in SCORES.items():
        for (benchmark, (_, chance, n)), value in zip(BENCHMARKS.items(), values, strict=True):
            if value is not None:
                write_evaluation(folder, run, benchmark, value / 100, n, chance)
    _write(folder / "samples/chat-large.json", _samples())
    _write(
        folder / "speed/chat-large.json",
        {
            "run": "chat-large",
            "points": _speed_points(),
            "options": _decoding_options(),
            "provenance": _provenance("speed", 0.0, 0),
        },
    )
    return folder


def build_all(workdir: Path, plan: ReportPlan) -> list[Path]:
    """Builds everything in the order of the workflow. Returns the paths written."""
    written = build_tables(workdir, plan, workdir / "tables")
    written += build_figures(workdir, plan, workdir / "figures")
    written += build_claims(workdir, plan, workdir / "claims.json")
    return list(written + build_page(workdir, plan, workdir / "report"))


def write_run(folder, run, noise, *, first, final, steps=4500, every=25, wall=5_400.0, standard_error=0.006) -> None:
    """Writes metrics.jsonl and provenance.json of one run whose loss decays from `first` to `final`."""
    lines = []
    for step in range(every, steps + 1, every):
        loss = final + (first - final) * exp(-9 * step / steps) + 0.04 * noise.standard_normal()
        lines.append(_train_line(step, steps, loss, wall))
    for index in range(11):
        step = steps * index // 10
        loss = final + 0.05 + (first - final) * exp(-9 * step / steps) + 0.004 * noise.standard_normal()
        lines.append(_eval_line(step, steps, loss, wall, standard_error))
    lines.sort(key=lambda line: line["step"])
    path = folder / f"runs/{run}/metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    _write(folder / f"runs/{run}/provenance.json", _provenance(run, wall, steps))


def write_evaluation(folder: Path, run: str, benchmark: str, value: float, n: int, chance: float | None) -> None:
    """Writes one evaluation file with a Wilson interval."""
    correct = round(value * n)
    low, high = wilson_interval(correct, n)
    metric = {"value": correct / n, "standard_error": sqrt(value * (1 - value) / n), "low": low, "high": high, "n": n}
    record = {
        "run": run,
        "benchmark": benchmark,
        "task": benchmark,
        "shots": 5,
        "n": n,
        "metric": "acc",
        "filter": "none",
        "metrics": {"acc": metric},
        "chance": chance,
        "scorer": {
            "likelihood": {"estimator": "mc" if "monte-carlo" in run else "auto"},
            "special_tokens": "none",
            "seed": 42,
        },
        "passes": (512 if "monte-carlo" in run else 4) * n,
        "passes_per_document": 512.0 if "monte-carlo" in run else 4.0,
        "standard_error_of_answers": 0.81 if "monte-carlo" in run else 0.05,
        "wall_seconds": 0.31 * n,
        "subtasks": {},
        "provenance": _provenance(run, 0.31 * n, 0) | {"model_seconds": (2.9 if "monte-carlo" in run else 0.02) * n},
    }
    _write(folder / f"evals/{run}/{benchmark}.json", record)


def _train_line(step: int, steps: int, loss: float, wall: float) -> dict:
    return {
        "step": step,
        "epoch": round(20 * step / steps, 3),
        "split": "train",
        "loss": loss,
        "nll": loss * 0.98,
        "learning_rate": 1e-4 * (1 - step / steps),
        "grad_norm": 0.8,
        "tokens": step * 262_144,
        "tokens_per_second": 182_000.0,
        "wall_seconds": wall * step / steps,
    }


def _eval_line(step: int, steps: int, loss: float, wall: float, standard_error: float) -> dict:
    return {
        "step": step,
        "epoch": round(20 * step / steps, 3),
        "split": "eval",
        "loss": loss,
        "standard_error": standard_error,
        "targets": 251_048,
        "wall_seconds": wall * step / steps,
    }


def _provenance(run: str, wall: float, steps: int) -> dict:
    return {
        "run": run,
        "seed": 42,
        "commit": hashlib.sha1(b"commit").hexdigest(),
        "dirty": False,
        "config_digest": hashlib.sha256(run.encode()).hexdigest(),
        "data_digest": hashlib.sha256(run.split("-")[0].encode()).hexdigest(),
        "hardware": "NVIDIA A100-SXM4-80GB",
        "device": "cuda:0",
        "processes": 8,
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "written": "2026-11-20T08:15:00+0000",
        "wall_seconds": wall,
        "tokens": steps * 262_144,
        "parameters": 395_831_296 if "large" in run else 149_014_272,
    }


def _samples() -> dict:
    answer = (
        "Water boils when its vapour pressure equals the pressure of the air above it. At sea level that is 100 °C;"
    )
    answer += " on a high mountain the air presses less, and water boils at a lower temperature."
    tokens = [(" " if index else "") + word for index, word in enumerate(answer.split(" "))] + ["\n", "[/Answer]"]
    order = np.random.default_rng(3).permutation(len(tokens))
    frames = [_frame(tokens, order, revealed) for revealed in range(0, len(tokens) + 1)]
    return {
        "run": "chat-large",
        "provenance": _provenance("samples", 0.0, 0),
        "conversations": [
            [
                {"role": "system", "content": "Answer briefly."},
                {"role": "user", "content": "Why does water boil at a lower temperature on a mountain?"},
                {"role": "assistant", "content": answer},
                {"role": "user", "content": "And in a pressure cooker?"},
                {"role": "assistant", "content": "There the pressure is higher, so that water boils at about 120 °C."},
            ],
            [
                {"role": "user", "content": f"What does this print?\n{NASTY}"},
                {"role": "assistant", "content": f"It prints:\n\n{NASTY}\n" + "averylongword" * 20},
            ],
        ],
        "film": {"prompt": "Why does water boil at a lower temperature up high?", "answer": answer, "frames": frames},
    }


def _frame(tokens: list[str], order: np.ndarray, revealed: int) -> dict:
    shown, newest = set(order[:revealed].tolist()), set(order[max(0, revealed - 3) : revealed].tolist())
    cells = []
    for index, text in enumerate(tokens):
        if index not in shown:
            cells.append({"text": "[MASK]", "state": "masked", "confidence": 0.0})
        else:
            state = "new" if index in newest else "kept"
            cells.append({"text": text, "state": state, "confidence": round(0.35 + 0.64 * ((index * 7) % 10) / 10, 3)})
    return {"step": revealed, "nfe": revealed, "tokens": cells}


def _speed_points() -> list[dict]:
    points = []
    for index, steps in enumerate((256, 128, 64, 32, 16)):
        seconds, quality = 0.6 + 0.098 * steps, (0.149, 0.142, 0.121, 0.071, 0.022)[index]
        low, high = wilson_interval(quality * 1319, 1319)
        points.append(
            {
                "steps": steps,
                "nfe": float(steps),
                "seconds": seconds,
                "tokens_per_second": 256 / seconds,
                "quality": quality,
                "quality_low": low,
                "quality_high": high,
                "metric": "exact match on GSM8K",
                "n": 1319,
            }
        )
    return points


def _decoding_options() -> list[dict]:
    exact = {"name": "exact", "nfe": 256.0, "seconds": 25.7, "quality": 0.149, "agreement": 1.0, "token_agreement": 1.0}
    faster = {"name": "threshold 0.9", "nfe": 71.0, "seconds": 7.4, "quality": 0.143} | {
        "agreement": 0.62,
        "token_agreement": 0.91,
    }
    shared = {"tokens_per_second": 512.0, "quality_low": 0.13, "quality_high": 0.17, "n": 1319}
    return [shared | exact, shared | faster]


def _write(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    made = write_workdir(Path(sys.argv[1]))
    print(build_all(made, ReportPlan.model_validate(plan_dict()))[-3])


def read_by(plan: ReportPlan) -> list[str]:
    """Every file that the tables, figures, claims and page of a plan read, relative to the work directory."""
    files = [f"runs/{run}/{name}" for run in plan.trained_runs() for name in ("metrics.jsonl", "provenance.json")]
    files += [f"evals/{row.run}/{scored.name}.json" for row in plan.results for scored in plan.scored(row)]
    files += [f"samples/{name}.json" for name in plan.sample_names()]
    return [*files, f"speed/{plan.speed}.json"] if plan.speed else files
