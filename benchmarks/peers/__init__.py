"""Other servers to compare with, if `--peers DIR` names where `install.sh DIR` put them."""
