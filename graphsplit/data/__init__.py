"""Data for the experiments: files that the user has, and what works at once. Nothing is downloaded.

- `mnist`, `cifar10`, `cifar100`, `text`: the published files, in a folder that the user names.
- `balanced`: as many examples of each class, as GraSP is meant to see them.
- `digits`: the handwritten digits of scikit-learn. `standard_library`: the text of Python's own modules.
"""

from graphsplit.data.balanced import balanced
from graphsplit.data.cifar import cifar10, cifar100
from graphsplit.data.corpora import Text, standard_library, text, windows
from graphsplit.data.handwritten import digits
from graphsplit.data.idx import mnist, read_idx

__all__ = [
    "Text",
    "balanced",
    "cifar10",
    "cifar100",
    "digits",
    "mnist",
    "read_idx",
    "standard_library",
    "text",
    "windows",
]
