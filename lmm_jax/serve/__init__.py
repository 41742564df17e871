"""Serving: an HTTP API that OpenAI's clients speak, and a page."""
