"""The HTTP front end, in the form of OpenAI's API: raw ASGI on uvicorn, every path and every field known by name."""
