# train: one run, from its data and its start to weights, metrics and provenance.
#
# reads    configs/runs/<run>.yaml, the record of the prepared data, the record of `init`
# writes   runs/<run>/ (config.yaml, metrics.jsonl, model/, provenance.json) and its record runs/<run>.json
# resumes  from .work/<run>-<digest>/, which no rule declares and Snakemake never touches


rule train:
    input:
        lambda wildcards: PLAN.train_inputs(wildcards.run),
        config="configs/runs/{run}.yaml",
    output:
        "runs/{run}.json",
    log:
        "logs/train/{run}.log",
    benchmark:
        "benchmarks/train/{run}.tsv"
    threads: 1
    resources:
        mem_mb=PLAN.asks("train", "mem_mb"),
        runtime=PLAN.asks("train", "runtime"),
        disk_mb=PLAN.asks("train", "disk_mb"),
        gpu=PLAN.asks("train", "gpu"),
    params:
        fetch=CACHE.fetch,
        launch=lambda wildcards: launcher(PROJECT.runs[wildcards.run], FROM_WORKDIR),
    message:
        "Train {wildcards.run}."
    shell:
        "{params.fetch}HF_HUB_OFFLINE=1 OMP_NUM_THREADS={threads} accelerate launch --config_file {params.launch:q} "
        "--num_cpu_threads_per_process {threads} -m dllm train --replace {input.config:q} &> {log:q}"
