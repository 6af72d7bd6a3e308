# tables, figures, claims, page: from numbers to the report.
#
# reads    configs/report.yaml, runs/*/metrics.jsonl and provenance.json, evals/*/*.json, samples/, speed/
# writes   tables/, figures/, claims.json, report/


localrules:
    tables,
    figures,
    claims,
    page,


REPORT_CODE = sorted(
    f"{PLAN.path_to_root}/{path.relative_to(ROOT)}"
    for path in (ROOT / "dllm" / "report").rglob("*")
    if path.suffix in (".py", ".css", ".html", ".md", ".jinja")
)


rule tables:
    input:
        PLAN.report_inputs(),
        config="configs/report.yaml",
        code=REPORT_CODE,
    output:
        expand(
            "tables/{name}.{suffix}",
            name=PLAN.report.table_names(),
            suffix=["csv", "md", "tex"],
        ),
        "tables/metrics.json",
    log:
        "logs/tables.log",
    resources:
        **PLAN.requests("report", name="tables"),
    message:
        "Build the tables."
    shell:
        "HF_HUB_OFFLINE=1 dllm report tables {input.config:q} &> {log:q}"


rule figures:
    input:
        PLAN.report_inputs(),
        config="configs/report.yaml",
        code=REPORT_CODE,
    output:
        expand(
            "figures/{name}.{suffix}",
            name=PLAN.report.figure_names(),
            suffix=["svg", "png", "csv"],
        ),
    log:
        "logs/figures.log",
    resources:
        **PLAN.requests("report", name="figures"),
    message:
        "Draw the figures."
    shell:
        "HF_HUB_OFFLINE=1 dllm report figures {input.config:q} &> {log:q}"


rule claims:
    input:
        PLAN.report_inputs(),
        config="configs/report.yaml",
        code=REPORT_CODE,
    output:
        "claims.json",
    log:
        "logs/claims.log",
    resources:
        **PLAN.requests("report", name="claims"),
    message:
        "Judge the claims."
    shell:
        "HF_HUB_OFFLINE=1 dllm report claims {input.config:q} &> {log:q}"


rule page:
    input:
        PLAN.report_inputs(),
        rules.tables.output,
        rules.figures.output,
        rules.claims.output,
        config="configs/report.yaml",
        code=REPORT_CODE,
    output:
        "report/index.html",
        "report/report.md",
        "report/provenance.csv",
        ["report/leaderboard.html"] if PLAN.report.leaderboard else [],
    log:
        "logs/page.log",
    resources:
        **PLAN.requests("report", name="page"),
    message:
        "Write the report."
    shell:
        "HF_HUB_OFFLINE=1 dllm report page {input.config:q} &> {log:q}"
