"""The verbs of the command line; ``prefopt.cli`` puts the parser together."""
