"""The comparison report and the other commands of the command line. `import visattn_fast` imports none of them."""
