"""What may a merge be asked for? Here, without torch, so that --help is quick."""

BASES = ("fp16", "nf4")  # what the adapter is added to
CHECKS = ("auto", "yes", "no", "only")
