# tables, figures, claims, page: from numbers to the report.
#
# reads    configs/report.yaml, runs/*/metrics.jsonl and provenance.json, evals/*/*.json, samples/, speed/
# writes   tables/, figures/, claims.json, report/


localrules:
    tables,
    figures,
    claims,
    page,


REPORT_CODE = sorted(str(path) for path in (ROOT / "dllm" / "report").rglob("*") if path.suffix in (".py", ".css", ".html", ".md", ".jinja"))


rule tables:
    """Build the tables."""
    input:
        PLAN.report_inputs(),
        config="configs/report.yaml",
        code=REPORT_CODE,
    output:
        expand("tables/{name}.{suffix}", name=PLAN.report.table_names(), suffix=["csv", "md", "tex"]),
    log:
        "logs/tables.log",
    shell:
        "dllm report tables {input.config:q} &> {log:q}"


rule figures:
    """Draw the figures."""
    input:
        PLAN.report_inputs(),
        config="configs/report.yaml",
        code=REPORT_CODE,
    output:
        expand("figures/{name}.{suffix}", name=PLAN.report.figure_names(), suffix=["svg", "png", "csv"]),
    log:
        "logs/figures.log",
    shell:
        "dllm report figures {input.config:q} &> {log:q}"


rule claims:
    """Judge the claims."""
    input:
        PLAN.report_inputs(),
        config="configs/report.yaml",
        code=REPORT_CODE,
    output:
        "claims.json",
    log:
        "logs/claims.log",
    shell:
        "dllm report claims {input.config:q} &> {log:q}"


rule page:
    """Write the report."""
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
    log:
        "logs/page.log",
    shell:
        "dllm report page {input.config:q} &> {log:q}"
