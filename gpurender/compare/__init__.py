"""`gpurender compare`: two renders held against each other. Start reading at `run.py`."""
