"""OpenAI's newer protocol, /v1/responses, as a translation to chats."""
