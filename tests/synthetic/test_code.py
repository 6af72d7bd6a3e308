import pytest

from dllm.synthetic.code import FORMS, LEAST, MOST, TEST_PROGRAMS, code, program
from dllm.synthetic.code import test_programs as programs_of_tests
from dllm.synthetic.entities import make_synthetic_world


@pytest.fixture(scope="module")
def world():
    return make_synthetic_world(7)


def holds(one, body: str) -> bool:
    """Whether the tests of a function hold with a body; ours are trusted, so no sandbox."""
    names: dict = {}
    exec(one.prompt + body, names)
    for test in one.tests:
        try:
            exec(test, names)
        except AssertionError:
            return False
    return True


def test_every_solution_passes_its_tests_and_those_of_no_other_function():
    for n in (LEAST, 9, MOST):
        every = [program(form, n) for form in FORMS]
        for one in every:
            assert [other.name for other in every if holds(one, other.solution)] == [one.name]
        for form in FORMS:
            assert not holds(program(form, n), program(form, n + 1).solution)


def test_no_function_of_the_benchmarks_occurs_in_training(world):
    trained = {row["text"] for split in ("train", "validation") for row in code(world, split, 2000)}
    tested = programs_of_tests(world)
    assert len({one.name for one in tested}) == len(tested) == TEST_PROGRAMS
    assert not trained & {one.source for one in tested}
    assert {text.split("_")[0] for text in trained} == {f"def {form.name.split('_')[0]}" for form in FORMS}


def test_no_constant_answer_passes_more_than_one_of_the_tests(world):
    tested = programs_of_tests(world)
    bodies = {one.solution for one in tested} | {f"    return {x}\n" for x in ("x", "True", "False", "0", "None")}
    assert max(sum(holds(one, body) for one in tested) for body in bodies) == 1
