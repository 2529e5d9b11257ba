"""Calls of functions in the text of an answer: how models write them, and how they are found in it."""
