"""The report of training runs: one HTML page that needs no network."""
