"""One engine behind HTTP: OpenAI's protocol, metrics and a page to watch the modes. Needs `pip install twotower[serve]`."""
