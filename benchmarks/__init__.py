"""What is measured: `python -m benchmarks` lists it, `docs/results.md` has what came out."""
