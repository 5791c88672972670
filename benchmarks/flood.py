"""One worker under a flood of datagrams. See ``python benchmarks/flood.py --help``."""

from bench.script import run

if __name__ == "__main__":
    run("flooding.flood_benchmark")
