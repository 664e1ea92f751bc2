"""What `recipes.pipeline` is made of: a chain's stages, their markers, what has changed since, and the check before a start."""
