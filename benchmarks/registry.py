"""The registry compared with other etcd clients. See ``python benchmarks/registry.py --help``."""

from bench.script import run

if __name__ == "__main__":
    run("etcd_clients.registry_benchmark")
