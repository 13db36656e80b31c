"""`gpurender bench`: how fast a render is here, and what limits it. Start reading at `run.py`."""
