"""Several models of one architecture as one graph in which every op does the work of all of them."""
