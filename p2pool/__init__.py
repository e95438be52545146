"""The node: a process that mines, accounts and pays over a sharechain."""
