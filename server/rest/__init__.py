"""The OpenAI-compatible REST API: routes, their types, and the HTTP server under them."""
