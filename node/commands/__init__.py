"""One module for each `isthmus` command; `node.cli` parses, these do."""
