"""The commands of ``peerd``. The command line imports a module when one of its commands runs."""
