"""The conductor: runs tools, reads files, talks to servers, and holds no threshold."""
