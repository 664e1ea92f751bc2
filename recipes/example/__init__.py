"""The embedded bilingual example: facts and sums, asked and answered in English and Japanese, made from a seed."""
