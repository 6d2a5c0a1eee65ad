"""`python -m tip_analysis.report RUN… -o reports/NAME.html`: the same as `tip-analysis report`."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv[1:1] = ["report"]
    runpy.run_module("tip_analysis", run_name="__main__", alter_sys=True)
