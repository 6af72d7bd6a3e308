# The whole report, from downloads to the page.
#
#   snakemake -c2                                  the laptop rehearsal (config/laptop.yaml)
#   snakemake -n --configfile config/paper.yaml    the plan of the full reproduction
#
# This file loads and checks the configuration and names the targets; the rules stand in workflow/rules, one verb each.

import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(workflow.basedir) / "workflow"))
from dllm.config import ConfigError, load_project
from dllm.surroundings import check_surroundings
from snakemake.exceptions import WorkflowError
from cache import Cache, record_of
from plan import PLACES, check_writable, make_plan, one_of
from remaining import say_remaining
from waiting import wait_for_jobs
from warm import start_warm

ROOT = Path(workflow.basedir)
OVERLAYS = [Path(path) for path in workflow.configfiles] or [
    ROOT / "config" / "laptop.yaml"
]

if not shutil.which(
    "dllm"
):  # the environment is not activated: its commands are those beside its Python
    os.environ["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    )

try:
    check_surroundings()
    PLAN = make_plan(load_project(ROOT / "config", *OVERLAYS))
    PROJECT = PLAN.project
    PLAN.write(ROOT / PROJECT.workdir)
    check_writable(ROOT / PROJECT.workdir)
except ValueError as fault:
    raise WorkflowError(str(fault)) from None
except OSError as fault:
    raise WorkflowError(
        f"{fault.filename}: {fault.strerror}; `workdir` must be a directory that can be written"
    ) from None


workdir: ROOT / PROJECT.workdir


CACHE = Cache(PROJECT.cache, f"{PLAN.path_to_root}/workflow/cache.py")


include: "workflow/rules/download.smk"
include: "workflow/rules/prepare.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/track.smk"


onstart:
    wait_for_jobs(workflow)
    start_warm(workflow)
    say_remaining(workflow, PLAN)


onsuccess:
    PLAN.close_rehearsal()


onerror:
    PLAN.close_rehearsal()


rule all:
    """Everything the report shows, and the report."""
    default_target: True
    input:
        PLAN.report_inputs(),
        rules.tables.output,
        rules.figures.output,
        rules.claims.output,
        rules.page.output,
        CACHE.pointers(PLAN.artifacts()),
