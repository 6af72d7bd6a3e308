# track: put finished artifacts into DVC's cache, where the configuration says `cache: dvc`.
#
# reads    records, and the directories beside them; the answers of evaluations
# writes   the pointers data/<name>.dvc, downloads/<name>.dvc, runs/<run>/model.dvc, evals/<row>/<benchmark>.samples.jsonl.dvc


localrules:
    track,


rule track:
    input:
        lambda wildcards: record_of(wildcards.artifact),
    output:
        "{artifact}.dvc",
    log:
        "logs/track/{artifact}.log",
    wildcard_constraints:
        artifact=r"(data|downloads)/[^/]+|runs/[^/]+/model|evals/.+[.]samples[.]jsonl",
    params:
        script=CACHE.script,
    message:
        "Put {wildcards.artifact} into the cache."
    shell:
        "python {params.script:q} track {input:q} {wildcards.artifact:q} &> {log:q}"
