"""Several annotators per item: their votes, how far they agree, and whether estimates of dispersion follow that."""
