"""A load test of an OpenAI endpoint: what is sent, the client, its readings and their pictures."""
