from .demo_run import run_demo as run_demo
from .example import example_run as example_run
from .example import make_small_run as make_small_run
