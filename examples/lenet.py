"""The LeNet of the network partition paper (Miranda & Von Zuben, arXiv 1511.02954): 431,080 parameters.

    graphsplit partition examples/lenet.py -k 2 -o out/lenet
    graphsplit inspect examples/lenet.py -k 10

Sub-models have 109,295 parameters for K = 2, 18,224 for K = 5 and 4,867 for K = 10, as in the paper.
"""

import torch
from torch import nn

torch.manual_seed(0)

model = nn.Sequential(
    nn.Conv2d(1, 20, 5),
    nn.MaxPool2d(2),
    nn.Conv2d(20, 50, 5),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(800, 500),
    nn.ReLU(),
    nn.Linear(500, 10),
)
example_inputs = (torch.randn(2, 1, 28, 28),)
