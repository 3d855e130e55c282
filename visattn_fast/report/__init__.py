"""The comparison report and the other commands of the command line. Nothing here is imported by the package itself."""
