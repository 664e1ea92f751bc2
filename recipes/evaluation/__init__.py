"""Scores of models: benchmark tasks, their statistics, and what a report says of them."""
