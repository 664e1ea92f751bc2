"""Data for training, made again: translations checked, near-duplicates and benchmark items found, scored rows chosen."""
