"""The harness: `python -m perf` measures, counts and reports what the ops of tritattn cost. Runs from a checkout."""
