"""Pixels and chores. Never loads flask."""

import os

# Threads of torch that wait for one another sleep instead of spinning. On a machine that also does other work, spinning
# made a call of the classifier 15 times as slow. Read when torch is loaded, so it is said before anything here can be.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
