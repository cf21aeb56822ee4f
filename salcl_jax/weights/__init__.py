"""Weights in and out: names and memory layouts of other packages, their files, and what goes with them."""
