"""The tasks, a file each; :mod:`loftup.eval.catalogue` lists them."""
