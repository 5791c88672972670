"""registry.py: the registry beside other etcd clients of Python."""
