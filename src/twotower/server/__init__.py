"""An HTTP server for all modes: OpenAI's and Anthropic's protocols over the engine, and pages to chat and to watch."""
