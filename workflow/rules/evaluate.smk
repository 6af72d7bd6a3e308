# evaluate: one row of the results table on one benchmark; sample and speed: what else the report shows of a run.
#
# reads    configs/evals/<row>/<benchmark>.yaml, the record of the checkpoint, the record of the benchmark's data
# writes   evals/<row>/<benchmark>.json and .samples.jsonl, samples/<name>.json, speed/<name>.json
# resumes  from answers already given, in .work


rule evaluate:
    input:
        lambda wildcards: PLAN.evaluation_inputs(wildcards.row, wildcards.benchmark),
        config="configs/evals/{row}/{benchmark}.yaml",
    output:
        scores="evals/{row}/{benchmark}.json",
        samples="evals/{row}/{benchmark}.samples.jsonl",
    log:
        "logs/evaluate/{row}/{benchmark}.log",
    benchmark:
        "benchmarks/evaluate/{row}/{benchmark}.tsv"
    threads: 1
    resources:
        mem_mb=PLAN.asks("evaluate", "mem_mb"),
        runtime=PLAN.asks("evaluate", "runtime"),
        disk_mb=PLAN.asks("evaluate", "disk_mb"),
        gpu=PLAN.asks("evaluate", "gpu"),
        nodes=PLAN.asks("evaluate", "nodes"),
        cpus_per_task=PLAN.asks("evaluate", "cpus_per_task"),
        tasks=PLAN.asks("evaluate", "tasks"),
        mpi=PLAN.asks("evaluate", "mpi"),
        gres=PLAN.asks("evaluate", "gres"),
        tasks_per_gpu=PLAN.asks("evaluate", "tasks_per_gpu"),
    params:
        fetch=CACHE.fetch,
        launch=PLAN.launch("evaluate"),
        offline=lambda wildcards: int(
            PROJECT.benchmarks[wildcards.benchmark].dataset is not None
        ),
    message:
        "Evaluate {wildcards.row} on {wildcards.benchmark}."
    shell:
        "{params.fetch}HF_HUB_OFFLINE={params.offline} OMP_NUM_THREADS={threads} {params.launch} evaluate "
        "{input.config:q} &> {log:q}"


rule sample:
    input:
        lambda wildcards: PLAN.record_of(PROJECT.samples[wildcards.name].checkpoint),
        config="configs/samples/{name}.yaml",
    output:
        "samples/{name}.json",
    log:
        "logs/sample/{name}.log",
    threads: 1
    resources:
        mem_mb=PLAN.asks("sample", "mem_mb"),
        runtime=PLAN.asks("sample", "runtime"),
        disk_mb=PLAN.asks("sample", "disk_mb"),
        gpu=PLAN.asks("sample", "gpu"),
    params:
        fetch=CACHE.fetch,
    message:
        "Sample conversations of {wildcards.name}."
    shell:
        "{params.fetch}HF_HUB_OFFLINE=1 OMP_NUM_THREADS={threads} dllm sample --config {input.config:q} --output {output:q} &> {log:q}"


rule speed:
    input:
        lambda wildcards: PLAN.speed_inputs(wildcards.name),
        config="configs/speed/{name}.yaml",
    output:
        "speed/{name}.json",
    log:
        "logs/speed/{name}.log",
    threads: 1
    resources:
        mem_mb=PLAN.asks("speed", "mem_mb"),
        runtime=PLAN.asks("speed", "runtime"),
        disk_mb=PLAN.asks("speed", "disk_mb"),
        gpu=PLAN.asks("speed", "gpu"),
    params:
        fetch=CACHE.fetch,
    message:
        "Measure steps against time and quality of {wildcards.name}."
    shell:
        "{params.fetch}HF_HUB_OFFLINE=1 OMP_NUM_THREADS={threads} dllm speed {input.config:q} --output {output:q} &> {log:q}"
