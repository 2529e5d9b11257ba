"""Drafts for mode `verified`: a file for each source."""
