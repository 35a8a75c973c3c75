"""How the steps to a goal fall with the batch size: trials, and what follows from them."""
