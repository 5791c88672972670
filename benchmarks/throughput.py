"""Messages per second, CPU per message, round trips. See ``python benchmarks/throughput.py --help``."""

from bench.script import run

if __name__ == "__main__":
    run("regimes.throughput_benchmark")
