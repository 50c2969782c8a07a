"""What tools.report is made of: runs as they lie in their folders, variants of several seeds, tables, pictures."""
