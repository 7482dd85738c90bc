"""One long prompt through the server and OpenAI's client."""
