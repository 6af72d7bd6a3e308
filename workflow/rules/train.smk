# train: one run, from its data and its start to weights, metrics and provenance.
#
# reads    configs/runs/<run>.yaml, the record of the prepared data, the record of `init`
# writes   runs/<run>/ (config.yaml, metrics.jsonl, model/, provenance.json) and its record runs/<run>.json
# network  only for a run whose data is streamed
# resumes  from .work/<run>-<digest>/, which no rule declares and Snakemake never touches


rule train:
    input:
        lambda wildcards: PLAN.inputs("train", wildcards.run),
        config="configs/runs/{run}.yaml",
    output:
        "runs/{run}.json",
    log:
        "logs/train/{run}.log",
    benchmark:
        "benchmarks/train/{run}.tsv"
    wildcard_constraints:
        run=one_of(PLAN.runs),
    priority: PLAN.priority("train")
    threads: 1
    resources:
        **PLAN.requests("train", *PLACES),
    params:
        fetch=CACHE.fetch,
        offline=lambda wildcards: PLAN.offline(wildcards.run),
        launch=PLAN.launch_command("train"),
    message:
        "Train {wildcards.run}."
    shell:
        "{params.fetch}HF_HUB_OFFLINE={params.offline} OMP_NUM_THREADS={threads} {params.launch} train --replace "
        "{input.config:q} &> {log:q}"
