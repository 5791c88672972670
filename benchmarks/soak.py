"""Memory of one worker over many messages. See ``python benchmarks/soak.py --help``."""

from bench.script import run

if __name__ == "__main__":
    run("flooding.soak_benchmark")
