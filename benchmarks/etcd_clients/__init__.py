"""registry.py: the registry compared with other etcd clients of Python."""
