"""What every test needs: the zoo on the path, and one thread for each of pytest's workers."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
# Two workers with two threads each on two cores wait for each other: a forward takes 100 times as long.
torch.set_num_threads(1)
