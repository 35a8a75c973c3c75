"""Division by depth: where a model can be cut, what crosses a cut, and the best cuts."""
