"""The command line: `main`, one module per command, and the parsing of options."""
