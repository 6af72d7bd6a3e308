# prepare: tokenize, split and pack a dataset for one tokenizer and length.
#
# reads    configs/data/<name>.yaml, the downloads it names
# writes   data/<name>/ (token files, manifest.json) and its record data/<name>.json
# resumes  from the finished shards in data/.<name>.partial, which no rule declares


rule prepare:
    input:
        lambda wildcards: PLAN.inputs("prepare", wildcards.name),
        config="configs/data/{name}.yaml",
    output:
        "data/{name}.json",
    log:
        "logs/prepare/{name}.log",
    benchmark:
        "benchmarks/prepare/{name}.tsv"
    wildcard_constraints:
        name=one_of(PLAN.data),
    priority: PLAN.priority("prepare")
    threads: lambda wildcards: PLAN.resources("prepare", wildcards.name)["cpus_per_task"]
    resources:
        **PLAN.requests("prepare"),
    params:
        fetch=CACHE.fetch,
    message:
        "Prepare {wildcards.name}."
    shell:
        "{params.fetch}HF_HUB_OFFLINE=1 dllm prepare --processes {threads} {input.config:q} &> {log:q}"
