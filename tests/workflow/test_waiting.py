"""Snakemake looks for jobs when one has ended."""

from types import SimpleNamespace

import pytest
from snakemake.cli import parse_args
from snakemake.settings.types import SchedulingSettings

from workflow.waiting import wait_for_jobs


@pytest.mark.parametrize(("words", "kept"), [([], None), (["--max-jobs-per-timespan", "5/1m"], (5, 60))])
def test_the_limit_of_jobs_a_second_is_lifted_unless_it_was_stated(words, kept):
    _, args = parse_args(["--cores", "1", "--workflow-profile", "none", *words])
    workflow = SimpleNamespace(scheduling_settings=SchedulingSettings(max_jobs_per_timespan=args.max_jobs_per_timespan))
    wait_for_jobs(workflow)
    limit = workflow.scheduling_settings.max_jobs_per_timespan
    assert (limit and (limit.max_jobs, limit.timespan)) == kept


def test_what_is_only_planned_has_no_limit():
    wait_for_jobs(SimpleNamespace(scheduling_settings=None))
