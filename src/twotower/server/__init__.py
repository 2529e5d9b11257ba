"""An HTTP server for all modes: OpenAI's protocol over the engine, and a page that shows blocks being denoised."""
