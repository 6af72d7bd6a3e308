# download: fetch pinned models and datasets, or make the laptop's stand-ins.
#
# reads    configs/downloads/<name>.yaml (and the synthetic world, for a model that takes its tokenizer)
# writes   downloads/<name>/ and its record downloads/<name>.json
# network  here, and in the training of a streamed dataset


localrules:
    download,


rule download:
    input:
        lambda wildcards: PLAN.inputs("download", wildcards.name),
        config="configs/downloads/{name}.yaml",
    output:
        "downloads/{name}.json",
    log:
        "logs/download/{name}.log",
    benchmark:
        "benchmarks/download/{name}.tsv"
    wildcard_constraints:
        name=one_of(PLAN.downloads),
    priority: PLAN.priority("download")
    resources:
        **PLAN.requests("download"),
    params:
        fetch=CACHE.fetch,
        offline=lambda wildcards: PLAN.made_here(wildcards.name),
    message:
        "Fetch {wildcards.name}."
    shell:
        "{params.fetch}HF_HUB_OFFLINE={params.offline} dllm download {input.config:q} &> {log:q}"
