"""From a finished work directory to tables, figures, claims and a report. Imports no torch.

plan      what the report shows, and so which files it reads
shown     a row for each table and figure: where its functions are, and when it is shown
load      files of the work directory -> tidy frames
tables    frames -> csv, markdown, LaTeX
figures   frames -> svg, png, and the csv each was drawn from
curves    figures of loss curves
claims    frames -> the claims, each with a verdict and the rule behind it
page      all of it -> report/index.html and report/report.md
"""
