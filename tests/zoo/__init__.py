"""Small models of many families, written the way their users write them."""

from zoo import fields, hub, odd, sequence, vision
from zoo.entry import Entry

ZOO: dict[str, Entry] = {}
for _module in (vision, sequence, odd, fields, hub):
    for _entry in _module.ENTRIES:
        if _entry.name in ZOO:
            raise ValueError(f"two models are called {_entry.name}")
        ZOO[_entry.name] = _entry

__all__ = ["ZOO", "Entry"]
