"""The command line, a file for each command: it reads its arguments, calls one function and prints the result."""
