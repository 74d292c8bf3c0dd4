"""How a run becomes processes: Snakemake beside a warm server, training under torchrun, rows shared within a job.

The forked processes of one job are ``prefopt.team``. May import ``store``.
"""
