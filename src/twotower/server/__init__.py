"""One HTTP process for all modes: OpenAI's protocol over the engine, and a page that shows blocks being denoised."""
