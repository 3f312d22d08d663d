"""Set before torch and vLLM are imported."""

import os

# The models and tensors of the suite are tiny: a second thread costs more than it computes, above all
# while another process (a server under test) uses the other core.
os.environ["OMP_NUM_THREADS"] = "1"
