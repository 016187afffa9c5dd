"""Other servers to compare with, installed by `install.sh DIR` and used with `--peers DIR`."""
