"""The embedded default: a tiny teacher and student that add three numbers, and the student's
planted flaw.

`language` holds problems, solutions and true labels; `tokenizer` builds the tokenizer; `train`
makes the weights again.
"""
