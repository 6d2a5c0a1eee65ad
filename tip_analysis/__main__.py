"""`python -m tip_analysis COMMAND …`: the same as the console script `tip-analysis`."""

from tip_analysis.cli.main import main

if __name__ == "__main__":
    main()
