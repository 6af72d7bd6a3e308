"""What a configuration costs before it is run: tokens, FLOPs, time, memory and disk of every job.

`shapes` counts parameters and FLOPs, `hardware` states what machines do, `passes` restates how many forward passes a
score takes, `data` how many rows a run reads, `cost` holds the equations, `project` lists the jobs, `measured` reads
what finished jobs took, `show` prints. Nothing here imports torch.
"""
