"""What it costs: `python -m bench [NAME ...]` runs registered benchmarks and writes bench/results/NAME.json."""
