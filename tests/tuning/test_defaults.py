"""What is chosen for a size of model and data."""

import numpy
import pytest

from dllm.tuning.defaults import Facts, block_size, epochs, run_settings


def facts(rows=2633, length=40, answer=10, is_text=False):
    lengths = numpy.full(min(rows, 2000), length)
    return Facts(rows, lengths, numpy.full(len(lengths), answer), is_text)


def test_a_bert_of_four_million_parameters_on_2633_rows_is_trained_as_it_was_tried():
    chosen = run_settings(facts(), parameters=4_400_000, positions=512, wished={})
    assert chosen["optimizer"] == {"learning_rate": 1e-3} and chosen["global_batch_size"] == 32
    assert chosen["epochs"] == 20 and chosen["length"] == 128


@pytest.mark.parametrize(
    ("parameters", "rate"), [(17e6, 5e-4), (68e6, 2e-4), (149e6, 1e-4), (395e6, 1e-4), (7e9, 2e-5)]
)
def test_a_larger_model_learns_at_a_smaller_rate(parameters, rate):
    chosen = run_settings(facts(), parameters=int(parameters), positions=8192, wished={})
    assert chosen["optimizer"]["learning_rate"] == rate


def test_few_rows_are_passed_over_more_often_and_many_less():
    assert epochs(50, 6) == 25 and epochs(4, 4) == 100 and epochs(52_000, 64) == 3 and epochs(10**6, 128) == 1


def test_a_few_rows_make_small_steps():
    assert run_settings(facts(rows=10), parameters=10**8, positions=512, wished={})["global_batch_size"] == 4


@pytest.mark.parametrize(
    ("length", "positions", "expected"),
    [(40, 512, 128), (300, 512, 320), (800, 512, 512), (3000, 8192, 1024), (40, 64, 64)],
)
def test_the_longest_row_is_where_few_conversations_are_cut_and_the_model_has_room(length, positions, expected):
    assert run_settings(facts(length=length), parameters=10**8, positions=positions, wished={})["length"] == expected


def test_text_is_cut_into_rows_of_which_there_are_enough():
    assert run_settings(facts(1000, 100, is_text=True), parameters=1, positions=512, wished={})["length"] == 256
    assert run_settings(facts(40, 100, is_text=True), parameters=1, positions=512, wished={})["length"] == 32


def test_short_answers_are_written_in_short_blocks():
    assert block_size(facts(answer=9), 128) == 16 and block_size(facts(answer=90), 128) == 32
    assert block_size(facts(is_text=True), 24) == 24


def test_what_a_user_wishes_is_done():
    wished = {"length": 96, "steps": 7, "global_batch_size": 3, "learning_rate": 0.5}
    chosen = run_settings(facts(), parameters=10**8, positions=512, wished=wished)
    assert (chosen["length"], chosen["steps"], chosen["global_batch_size"]) == (96, 7, 3) and "epochs" not in chosen
    assert chosen["optimizer"] == {"learning_rate": 0.5}
    assert run_settings(facts(), parameters=1, positions=512, wished={"epochs": 2.5})["epochs"] == 2.5
