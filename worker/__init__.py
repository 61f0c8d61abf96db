"""Pixels and chores. Never loads flask."""

import os

# Threads of torch that wait for one another sleep instead of spinning, which would ruin a machine that also does other
# work. Read when torch is loaded, so it is said before anything here can be.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
