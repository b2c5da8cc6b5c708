"""The user store: people's histories, vectors and feedback, API keys, and the registry of runs."""
