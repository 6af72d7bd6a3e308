# evaluate: one row of the results table on one benchmark; sample and speed: what else the report shows of a run.
#
# reads    configs/evals/<row>/<benchmark>.yaml, the record of the checkpoint, the record of the benchmark's data
# writes   evals/<row>/<benchmark>.json and .samples.jsonl, samples/<name>.json, speed/<name>.json
# resumes  from answers already given, in .work


rule evaluate:
    input:
        lambda wildcards: PLAN.inputs(
            "evaluate", f"{wildcards.row}/{wildcards.benchmark}"
        ),
        config="configs/evals/{row}/{benchmark}.yaml",
    output:
        scores="evals/{row}/{benchmark}.json",
        samples="evals/{row}/{benchmark}.samples.jsonl",
    log:
        "logs/evaluate/{row}/{benchmark}.log",
    benchmark:
        "benchmarks/evaluate/{row}/{benchmark}.tsv"
    wildcard_constraints:
        row=one_of(PROJECT.evaluations),
        benchmark=one_of(PROJECT.benchmarks),
    priority: PLAN.priority("evaluate")
    threads: 1
    resources:
        **PLAN.requests("evaluate", *PLACES),
    params:
        fetch=CACHE.fetch,
        launch=PLAN.launch_command("evaluate"),
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
        lambda wildcards: PLAN.inputs("sample", wildcards.name),
        config="configs/samples/{name}.yaml",
    output:
        "samples/{name}.json",
    log:
        "logs/sample/{name}.log",
    benchmark:
        "benchmarks/sample/{name}.tsv"
    wildcard_constraints:
        name=one_of(PLAN.samples),
    priority: PLAN.priority("sample")
    threads: 1
    resources:
        **PLAN.requests("sample", "gpu"),
    params:
        fetch=CACHE.fetch,
    message:
        "Sample conversations of {wildcards.name}."
    shell:
        "{params.fetch}HF_HUB_OFFLINE=1 OMP_NUM_THREADS={threads} dllm sample --config {input.config:q} --output {output:q} &> {log:q}"


rule speed:
    input:
        lambda wildcards: PLAN.inputs("speed", wildcards.name),
        config="configs/speed/{name}.yaml",
    output:
        "speed/{name}.json",
    log:
        "logs/speed/{name}.log",
    benchmark:
        "benchmarks/speed/{name}.tsv"
    wildcard_constraints:
        name=one_of(PLAN.speed),
    priority: PLAN.priority("speed")
    threads: 1
    resources:
        **PLAN.requests("speed", "gpu"),
    params:
        fetch=CACHE.fetch,
    message:
        "Measure steps against time and quality of {wildcards.name}."
    shell:
        "{params.fetch}HF_HUB_OFFLINE=1 OMP_NUM_THREADS={threads} dllm speed {input.config:q} --output {output:q} &> {log:q}"
