"""One service for many languages, on Ray Serve, with OpenAI's interface."""
