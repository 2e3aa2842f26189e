"""The commands of `puzzle`: parse arguments, call the pipeline, print results; nothing else."""
