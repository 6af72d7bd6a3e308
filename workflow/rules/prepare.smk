# prepare: tokenize, split and pack a dataset for one tokenizer and length.
#
# reads    configs/data/<name>.yaml, the downloads it names
# writes   data/<name>/ (token files, manifest.json) and its record data/<name>.json


rule prepare:
    input:
        lambda wildcards: PLAN.data_records(PLAN.data[wildcards.name]),
        config="configs/data/{name}.yaml",
    output:
        "data/{name}.json",
    log:
        "logs/prepare/{name}.log",
    benchmark:
        "benchmarks/prepare/{name}.tsv"
    resources:
        **PLAN.requests("prepare"),
    params:
        fetch=CACHE.fetch,
    message:
        "Prepare {wildcards.name}."
    shell:
        "{params.fetch}HF_HUB_OFFLINE=1 dllm prepare {input.config:q} &> {log:q}"
