"""One file per command of the command line: its arguments, and what it calls. torch is imported only when it runs."""
