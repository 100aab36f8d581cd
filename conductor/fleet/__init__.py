"""Many releases from one process: models x recipes x suites, with one table and one summary."""
