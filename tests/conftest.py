"""What every test needs before the first import: no hub, no display, no chatter."""

import os

os.environ["OMP_NUM_THREADS"] = (
    "1"  # tests run side by side, and tiny models gain nothing from threads
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["MPLBACKEND"] = "Agg"
os.environ["COLUMNS"] = "120"
