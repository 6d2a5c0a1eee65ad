"""The agent pair: tasks that need two tools, their language, environment, tokenizer and training.
Read `language` first."""
