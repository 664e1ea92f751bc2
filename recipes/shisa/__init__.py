"""The full recipe of Shisa 7B: one TOML file for each stage, and the split by language that two of them need."""
