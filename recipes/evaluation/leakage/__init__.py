"""Text in another language than the answer's: found in answers, foreseen from a model's probabilities, measured by sampler."""
