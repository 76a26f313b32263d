"""Safety units (SSAH, arXiv 2410.10862): find the units that carry safety, prove it, protect them, align in others."""
