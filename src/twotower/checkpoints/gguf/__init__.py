"""GGUF files, the format of llama.cpp: their tensors, configuration and tokenizer."""
