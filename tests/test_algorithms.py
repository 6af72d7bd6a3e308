"""The table of algorithms: every part that a row names is there, and what is not there is refused by one line."""

import subprocess
import sys

import pytest

from dllm.algorithms import ALGORITHMS, PARTS, algorithm_for, algorithm_named
from dllm.config import Recipe
from dllm.objectives.objective import Objective
from dllm.sampling.sampler import Sampler


@pytest.mark.parametrize("row", ALGORITHMS.values(), ids=list(ALGORITHMS))
def test_every_part_of_a_row_is_there_or_is_refused_by_one_line(row):
    assert row.objective is None or issubclass(row.part("objective"), Objective)
    for part, what in PARTS.items():
        if getattr(row, part) is None:
            with pytest.raises(ValueError, match=f"algorithm = '{row.name}' has no {what}; {row.instead}"):
                row.part(part)
        elif part == "sampler":
            assert isinstance(row.part(part)(), Sampler)
        elif part == "scorer":
            assert {"nelbo", "greedy_match"} <= set(dir(row.part(part)()))
    assert set(row.also_as) <= set(ALGORITHMS) - {row.name}


def test_an_unknown_algorithm_is_an_error_with_the_known_names():
    for ask in (lambda: algorithm_named("gan"), lambda: algorithm_for("mdlm", "gan")):
        with pytest.raises(ValueError, match=f"algorithm = 'gan'; allowed: {', '.join(ALGORITHMS)}"):
            ask()


def test_a_model_is_used_with_what_its_row_allows():
    assert algorithm_for("mdlm", None).name == "mdlm" == algorithm_for("mlm", "mdlm").name
    with pytest.raises(ValueError, match="cannot use a model trained with 'bd3lm'; allowed: bd3lm; leave it out"):
        algorithm_for("bd3lm", "mdlm")


def test_a_recipe_is_refused_in_the_words_of_the_row():
    fault = algorithm_named("mdlm").recipe_error(Recipe(time_low=0.4, time_high=0.6))
    assert fault == "has time_low = 0.4; algorithm = 'mdlm' allows `0.0` only: take another recipe"
    assert algorithm_named("bd3lm").recipe_error(Recipe(time_low=0.4, time_high=0.6)) is None


def test_the_table_imports_nothing_of_the_package():
    code = (
        "import dllm.algorithms, sys; assert {m for m in sys.modules if m.startswith('dllm.')} == {'dllm.algorithms'}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
