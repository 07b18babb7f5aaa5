"""A run's model behind HTTP: OpenAI's completions, and a page to play with it."""
