"""One file a verb of the command line; each is a few lines that call the library."""
