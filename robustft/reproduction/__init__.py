"""`reproduce`: the rows and figures of the paper on any model and data."""
