"""The terminal chat: what was said, who answers, and how an answer is drawn while it comes."""
