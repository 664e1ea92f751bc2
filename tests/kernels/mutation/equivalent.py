"""Mutants that no test can find out, as they compute the same: by module, (name of the mutant, reason)."""

EQUIVALENT: dict[str, dict[str, str]] = {}
